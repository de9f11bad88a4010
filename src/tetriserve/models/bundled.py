"""The small default model: a complete FLUX pipeline, built offline and byte for byte the same every time.

`python -m tetriserve.models.bundled DIRECTORY` builds it in a process of its own, for callers that must not import
torch. Importing this module does not.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BUNDLED_VERSION = "1"
"""Changes whenever the built files do: built directories of other versions are left alone."""

_SEED = 20240811
_NUM_TEXT_TOKENS = 64
_EMBED_DIM = 64
_LATENT_CHANNELS = 16
_WORD_END = "</w>"
_CARD = {
    "name": "tetriserve-tiny",
    "num_steps": 20,
    "guidance_scale": 3.5,
    "sizes": ["256x256", "512x512", "1024x1024"],
    "dtype": "float32",
}
_COMMON_WORDS = """
a an and are as at above around back background before behind below beneath beside between big black blue bold bottom
bright brown by centre center circle clear cloud cloudy cold color colour corner cube cyan dark day deep detailed disc
dot down drawing edge empty eight field fire five flat flower forest four from front glass gold golden gradient grass
gray green grey ground heart high horizon horizontal house huge ice illustration image in inside into is it its large
left light lime line long low magenta many middle minimal moon mountain near navy next night nine no not of olive on
one or orange outside oval over painting pale paper pattern photo picture pink plain point purple rainbow rectangle red
right ring river road rock round sand sea seven shape sharp shiny sign silver simple six sky small snow soft solid
sphere spiral square star stone stripe striped stripes sun sunset teal ten texture the thick thin three tiny to top
tree triangle turquoise two under up vertical very violet vivid warm water wave white wide window with without wood
yellow blurry cat dog bird fish horse robot car boat person face hand eye city street building bridge castle garden
beach island lake desert space planet rocket ship train clock book cup lamp chair table apple banana bread cake
"""


def location(cache_dir: Path) -> Path:
    """Where `ensure` keeps the model of this version."""
    return cache_dir / f"tetriserve-tiny-{BUNDLED_VERSION}"


def ensure(cache_dir: Path) -> Path:
    """The model's directory, built first (about 5 s) if absent. Safe to call from several processes at once."""
    directory = location(cache_dir)
    if not directory.is_dir():
        build(directory)
    return directory


def build(directory: Path) -> None:
    """Build the pipeline so that `directory` appears complete or not at all; if another process is first, its wins.

    Raises:
        OSError: `directory` cannot be written, or is in the way and no pipeline.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        complete = Path(scratch) / "pipeline"
        _save(complete)
        try:
            os.rename(complete, directory)
        except OSError:
            if not (directory / "model_index.json").is_file():
                raise


def _save(directory: Path) -> None:
    import transformers
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    transformers.utils.logging.disable_progress_bar()
    vocab, merges = _train_bpe()
    clip_tokenizer, t5_tokenizer = _clip_tokenizer(vocab, merges), _t5_tokenizer(vocab, merges)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_seeded(0, _vae),
        text_encoder=_seeded(1, lambda: _clip(clip_tokenizer)),
        tokenizer=clip_tokenizer,
        text_encoder_2=_seeded(2, lambda: _t5(t5_tokenizer)),
        tokenizer_2=t5_tokenizer,
        transformer=_seeded(3, _transformer),
    )
    pipeline.save_pretrained(directory, safe_serialization=True)
    (directory / "tetriserve.json").write_text(json.dumps(_CARD, indent=2) + "\n", encoding="utf-8")


def _seeded(index: int, make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """`make()` with weights that depend on nothing but the seed; torch's global generator is left as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED + index)
        return make().eval()


def _transformer() -> Any:
    """9 million parameters: 8 heads of 32; 64, 256 and 1024 image tokens at 256, 512 and 1024 pixels."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4 * _LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=_EMBED_DIM,
        pooled_projection_dim=_EMBED_DIM,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def _vae() -> Any:
    """Five blocks, so 16 pixels to a latent pixel and 32 to a token; narrow where the image is large."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(16, 16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=_LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=512,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def _clip(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_EMBED_DIM,
            intermediate_size=2 * _EMBED_DIM,
            projection_dim=_EMBED_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _t5(tokenizer: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=_EMBED_DIM,
            d_kv=_EMBED_DIM // 4,
            d_ff=2 * _EMBED_DIM,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _train_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE: every common word of a prompt is one token, and any other text falls back to its bytes.

    Not `tokenizers`' own trainer: it breaks ties by chance, and the files would differ from run to run.
    """
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [f"{byte}{_WORD_END}" for byte in alphabet]
    spellings = [[*word[:-1], word[-1] + _WORD_END] for word in _COMMON_WORDS.split()]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for spelling in spellings for pair in pairwise(spelling)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        tokens.append("".join(best))
        spellings = [_merged(spelling, best) for spelling in spellings]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def _merged(spelling: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for token in spelling:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def _clip_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    from transformers import CLIPTokenizer

    special = {token: len(vocab) + index for index, token in enumerate(("<|startoftext|>", "<|endoftext|>"))}
    return CLIPTokenizer(vocab=vocab | special, merges=merges, model_max_length=77)


def _t5_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """A plain fast tokenizer: T5's own class rebuilds itself as Unigram, which cannot fall back to bytes."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    shifted = special | {token: index + len(special) for token, index in vocab.items()}
    backend = Tokenizer(models.BPE(shifted, merges, end_of_word_suffix=_WORD_END))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=_NUM_TEXT_TOKENS,
    )


if __name__ == "__main__":
    build(Path(sys.argv[1]))
