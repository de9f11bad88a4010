"""Qwen-Image, Qwen-Image-Edit and Qwen-Image-Edit-Plus, by classes and layout."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.families.case import FamilyCase, randomised
from tetriserve.core.request import Request

_SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
_PICTURES = {
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
}  # fmt: skip
_WORDS = "a red circle on a blue background rain Picture 1: 2: 3:"


def build(path: Path) -> None:
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline(**_components(base_dim=4))
    pipeline.save_pretrained(path)
    _as_published(path / "tokenizer")


def build_edit(path: Path, pipeline_class: str = "QwenImageEditPlusPipeline", **transformer: Any) -> None:
    import diffusers

    pipeline = getattr(diffusers, pipeline_class)(**_components(base_dim=2, **transformer), processor=None)
    pipeline.save_pretrained(path)
    _as_published(path / "tokenizer")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"processor": ["transformers", "Qwen2VLProcessor"]}))
    pipeline.tokenizer.save_pretrained(path / "processor")
    (path / "processor/preprocessor_config.json").write_text(json.dumps(_PICTURES))


def _components(base_dim: int, **transformer: Any) -> dict[str, Any]:
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = _tokenizer()
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start",)}
    ids |= {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        "bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        "vae": randomised(
            AutoencoderKLQwenImage(
                base_dim=base_dim, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, attn_scales=[],
                temperal_downsample=[False, True, True], latents_mean=[-0.7, 0.1, 0.3, -0.2],
                latents_std=[1.5, 0.8, 1.2, 2.0],
            )
        ),
        "text_encoder": randomised(Qwen2_5_VLForConditionalGeneration(config)),
        "tokenizer": tokenizer,
        "transformer": randomised(
            QwenImageTransformer2DModel(
                in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
                joint_attention_dim=32, axes_dims_rope=(4, 6, 6), **transformer,
            )
        ),
    }  # fmt: skip


def _tokenizer() -> Any:
    """Knows each word of the templates as one token, so that they are as long as with the published vocabulary."""
    from diffusers import QwenImageEditPlusPipeline, QwenImagePipeline
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=0, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    templates = [_template(each) for each in (QwenImagePipeline, QwenImageEditPlusPipeline)]
    words.train_from_iterator([*(re.sub(r"<\|\w+\|>|\{\}", "\n", each) for each in templates), _WORDS], trainer)
    model = json.loads(words.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        extra_special_tokens=list(_SPECIAL),
        model_max_length=131072,
        padding_side="right",
    )


def _template(pipeline_class: Any) -> str:
    """What the pipeline puts prompts into."""
    nothing = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer"))
    names = inspect.signature(pipeline_class.__init__).parameters
    template: str = pipeline_class(**{name: nothing[name] for name in nothing if name in names}).prompt_template_encode
    return template


def _as_published(tokenizer: Path) -> None:
    """A vocabulary and its merges, in place of both in one file."""
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = (" ".join(pair) for pair in model["merges"])
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]))
    (tokenizer / "tokenizer.json").unlink()


def call(pipeline: Any, request: Request, length: int) -> Mapping[str, Any]:
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "true_cfg_scale": request.true_cfg_scale,
        "height": request.shape.height,
        "width": request.shape.width,
        "max_sequence_length": length,
    }


GUIDED = {"negative_prompt": " ", "true_cfg_scale": 4.0}
QWEN_IMAGE = FamilyCase(
    name="qwen-image", build=build, call=call, guided=GUIDED, image_to_image="QwenImageImg2ImgPipeline"
)


def given(path: Path) -> Mapping[str, Any]:
    """transformers itself cannot load the processor without torchvision."""
    from tetriserve.models.qwen_image_edit.processor import load_processor

    return {} if find_spec("torchvision") is not None else {"processor": load_processor(path / "processor")}


QWEN_IMAGE_EDIT_PLUS = FamilyCase(
    name="qwen-image-edit-plus",
    build=partial(build_edit, zero_cond_t=True),  # as in Qwen-Image-Edit-2511
    call=call,
    guided=GUIDED,
    given=given,
    num_text_tokens=1024,  # the pipeline cuts no texts
    pictures=((123, 301), (200, 90), (64, 64)),
)
QWEN_IMAGE_EDIT = FamilyCase(
    name="qwen-image-edit",
    build=partial(build_edit, pipeline_class="QwenImageEditPipeline"),
    call=call,
    guided=GUIDED,
    given=given,
    num_text_tokens=1024,  # the pipeline cuts no texts
    pictures=((123, 301),),
)
