"""Write a tiny Wan pipeline with random weights: `python -m tetriserve.examples.small_wan DIR`.

Components, layout and configurations are those of the published Wan checkpoints, with small numbers. Its videos are
noise: it is for trying the API, the board and faults, not pictures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tetriserve.core.errors import ConfigError
from tetriserve.options import one_line_errors

if TYPE_CHECKING:
    import torch

KINDS = {
    "t2v": "Wan 2.1, text to video",
    "t2v-a14b": "Wan 2.2 A14B, text to video: two transformers",
    "ti2v-5b": "Wan 2.2 TI2V-5B, text to video, with or without a first frame: a VAE of 16 pixels a latent",
    "i2v": "Wan 2.1, image to video: an image encoder",
    "i2v-a14b": "Wan 2.2 A14B, image to video: two transformers",
}
"""Layouts of published checkpoints."""
NUM_HEADS = 4
_HEAD_DIM = 24
_TEXT_DIM = 32
_IMAGE_DIM = 32
_NUM_TEXT_TOKENS = 64
_NUM_IMAGE_TEXT_TOKENS = 512
"""Diffusers tells texts from pictures by this number, where there is an image encoder."""
_SIZES = ("128x128x17", "256x256x17", "256x256x33")
_TOKENIZER = Path(__file__).parents[1] / "models" / "tiny" / "tokenizer_2"


def build(path: Path, kind: str = "t2v", **transformer: Any) -> None:
    """Write a pipeline of `KINDS` into the directory `path`.

    Args:
        transformer: changes of the transformers' configurations.

    Raises:
        OSError: a file cannot be written.
    """
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    is_from_image, is_5b, has_two = kind.startswith("i2v"), kind == "ti2v-5b", kind.endswith("a14b")
    vae = _vae_of_5b() if is_5b else _vae()
    components: dict[str, Any] = {
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=5.0 if is_5b else 3.0,
        ),
        "tokenizer": _tokenizer(),
        "text_encoder": _text_encoder(),
        "vae": vae,
        "expand_timesteps": is_5b,
    }
    options = {
        "in_channels": vae.config.z_dim,
        "out_channels": vae.config.z_dim,
        "num_attention_heads": NUM_HEADS,
        "attention_head_dim": _HEAD_DIM,
        "text_dim": _TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 192,
        "num_layers": 2,
        "rope_max_seq_len": 1024,
    }
    if is_from_image:  # a mask of as many channels as frames share a latent frame, and the picture's latents
        options["in_channels"] = 2 * vae.config.z_dim + vae.config.scale_factor_temporal
    if kind == "i2v":
        options |= {"image_dim": _IMAGE_DIM, "added_kv_proj_dim": NUM_HEADS * _HEAD_DIM}
        components |= _image_encoder()
    models = [diffusers.WanTransformer3DModel(**{**options, **transformer}) for _ in range(2 if has_two else 1)]
    components["transformer"] = _randomised(models[0], 1)
    if has_two:
        components["transformer_2"] = _randomised(models[1], 2)
        components["boundary_ratio"] = 0.9 if is_from_image else 0.875
    pipeline = (diffusers.WanImageToVideoPipeline if is_from_image else diffusers.WanPipeline)(**components)
    pipeline.save_pretrained(path)
    for file in (path / "model_index.json", path / "image_processor" / "preprocessor_config.json"):
        if file.is_file():  # the published name, which stands for any of its implementations
            file.write_text(file.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor"))
    facts = {
        "name": f"small-wan-{kind}",
        "num_steps": 20,
        "sizes": list(_SIZES),
        "dtype": "float32",
        "max_sequence_length": _NUM_IMAGE_TEXT_TOKENS if kind == "i2v" else _NUM_TEXT_TOKENS,
    }
    (path / "tetriserve.json").write_text(json.dumps(facts, indent=2) + "\n")


def _tokenizer() -> Any:
    """That of T5 in the bundled model, whose class is that of UMT5's published tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_TOKENIZER, local_files_only=True, model_max_length=512)


def _text_encoder() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(_tokenizer()), d_model=_TEXT_DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return _randomised(UMT5EncoderModel(config), 3)


def _vae() -> Any:
    """8 pixels a latent, and 4 frames."""
    from diffusers import AutoencoderKLWan

    return _randomised(AutoencoderKLWan(base_dim=4, num_res_blocks=1), 4)


def _vae_of_5b() -> Any:
    """16 pixels a latent, and 4 frames."""
    import torch
    from diffusers import AutoencoderKLWan

    mean, deviation = torch.randn(2, 48, generator=torch.Generator().manual_seed(5))
    return _randomised(
        AutoencoderKLWan(
            base_dim=4,
            decoder_base_dim=8,
            z_dim=48,
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=_rounded(0.2 * mean),
            latents_std=_rounded(0.6 + 0.1 * deviation.clamp(-3, 3)),
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_temporal=4,
            scale_factor_spatial=16,
        ),
        4,
    )


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(float(value), 4) for value in values]


def _image_encoder() -> Mapping[str, Any]:
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=_IMAGE_DIM, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32,
        patch_size=8, hidden_act="gelu", projection_dim=16,
    )  # fmt: skip
    side = {"height": 32, "width": 32}
    return {
        "image_encoder": _randomised(CLIPVisionModel(config), 6),
        "image_processor": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side),
    }


def _randomised(model: Any, seed: int) -> Any:
    """The model in evaluation mode, all of its parameters random: some would begin as zeros, and have no effect."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("gamma", "norm_q.weight", "norm_k.weight")) or (parameter.ndim == 1 and "weight" in name):
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise / max(parameter[0].numel(), 1) ** 0.5)
            else:
                parameter.copy_(0.03 * noise)
    return model.eval()


def _check_directory(path: Path) -> None:
    """
    Raises:
        ConfigError: `path` is there and is no empty directory.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is no directory; name a new one, or an empty one")
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(f"{path} is not empty; name a new directory, or an empty one")


def write(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory, or an empty one.")],
    kind: Annotated[str, typer.Option(help="; ".join(f"{name} ({what})" for name, what in KINDS.items()))] = "t2v",
) -> None:
    """Write a tiny Wan pipeline with random weights into DIR. Its videos are noise."""
    with one_line_errors():
        if kind not in KINDS:
            raise ConfigError(f"kind is {kind[:200]!r}; allowed: {', '.join(KINDS)}")
        try:
            _check_directory(directory)
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "tetriserve.json").touch()  # before seconds of work
            build(directory, kind)
        except OSError as error:
            raise ConfigError(f"{directory} cannot be written: {error.strerror or error}") from None
    num_bytes = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{directory}: {KINDS[kind]}, {num_bytes / 1e6:.1f} MB of random weights. Its videos are noise.")
    console.print(f"Serve it with: tetriserve serve --model {directory}", markup=False)


if __name__ == "__main__":
    typer.run(write)
