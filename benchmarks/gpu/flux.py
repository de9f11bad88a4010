"""FLUX.1-dev by its configuration, with random weights: of the size and the speed of the published model.

Run as a program it writes a whole checkpoint, which `serving.py` serves:

    python benchmarks/gpu/flux.py DIRECTORY [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tetriserve.launch import BUNDLED_MODEL

DTYPE = torch.bfloat16
PIXELS_PER_TOKEN = 16
MADE = "made"
"""The line that says that all weights are in host memory: from here on the device is not used any more."""


@dataclass(frozen=True)
class Scale:
    """A FLUX: of the published size, or so small that a CPU runs it at once.

    sides: of the square pictures that are measured, in pixels.
    served: sides that a server of it is asked for.
    """

    transformer: dict[str, Any]
    vae: dict[str, Any]
    clip: dict[str, Any]
    t5: dict[str, Any]
    num_text_tokens: int
    sides: tuple[int, ...]
    served: tuple[int, ...]


_VAE = {
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
FULL = Scale(
    transformer={"guidance_embeds": True},
    vae=_VAE | {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024},
    clip={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
    },
    t5={"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128},
    num_text_tokens=512,
    sides=(256, 512, 1024, 2048),
    served=(256, 512, 1024),
)
TINY = Scale(
    transformer={
        "guidance_embeds": True,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    },
    vae=_VAE | {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "sample_size": 64, "norm_num_groups": 4},
    clip={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 32,
        "vocab_size": 1000,
        "max_position_embeddings": 77,
    },
    t5={"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 1000},
    num_text_tokens=32,
    sides=(32, 64),
    served=(32, 64),
)


def scale_of(is_dry_run: bool) -> Scale:
    return TINY if is_dry_run else FULL


def device_of(is_dry_run: bool) -> torch.device:
    return torch.device("cpu" if is_dry_run else "cuda:0")


@contextmanager
def _made_on(device: torch.device) -> Iterator[None]:
    """Models are made in bf16 where they run: on the host, 12 billion random numbers would take minutes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def make_transformer(scale: Scale, device: torch.device) -> Any:
    from diffusers import FluxTransformer2DModel

    with _made_on(device):
        return FluxTransformer2DModel(**scale.transformer).eval().requires_grad_(False)


def make_vae(scale: Scale, device: torch.device) -> Any:
    from diffusers import AutoencoderKL

    with _made_on(device):
        return AutoencoderKL(**scale.vae).eval().requires_grad_(False)


def step_inputs(transformer: Any, scale: Scale, side: int) -> dict[str, Any]:
    """Arguments of one forward: random latents and embeddings of a square picture with `side` pixels."""
    device, config = transformer.device, transformer.config
    side_tokens = side // PIXELS_PER_TOKEN
    num_tokens = side_tokens**2
    rows, columns = torch.meshgrid(torch.arange(side_tokens), torch.arange(side_tokens), indexing="ij")
    img_ids_SA = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(num_tokens, 3)
    return {
        "hidden_states": torch.randn(1, num_tokens, config.in_channels, device=device, dtype=DTYPE),
        "encoder_hidden_states": torch.randn(
            1, scale.num_text_tokens, config.joint_attention_dim, device=device, dtype=DTYPE
        ),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, device=device, dtype=DTYPE),
        "timestep": torch.full((1,), 0.5, device=device, dtype=DTYPE),
        "guidance": torch.full((1,), 3.5, device=device, dtype=torch.float32),
        "img_ids": img_ids_SA.to(device, DTYPE),
        "txt_ids": torch.zeros(scale.num_text_tokens, 3, device=device, dtype=DTYPE),
        "return_dict": False,
    }


def num_flop(transformer: Any, scale: Scale, side: int) -> float:
    """Floating-point operations of one step: its blocks' products with weights, and attention."""
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    num_blocks = config.num_layers + config.num_single_layers
    num_tokens = scale.num_text_tokens + (side // PIXELS_PER_TOKEN) ** 2
    return float(num_blocks * (24 * width**2 * num_tokens + 4 * width * num_tokens**2))


def write_checkpoint(path: Path, scale: Scale, device: torch.device) -> int:
    """A `FluxPipeline` directory with random weights in bf16; the bytes of all weights together.

    The tokenizers are the bundled model's, whose vocabulary is smaller than the encoders'.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

    tokenizer = CLIPTokenizer.from_pretrained(BUNDLED_MODEL / "tokenizer", model_max_length=77)
    tokenizer_2 = AutoTokenizer.from_pretrained(BUNDLED_MODEL / "tokenizer_2", model_max_length=scale.num_text_tokens)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with _made_on(device):
        text_encoder = CLIPTextModel(CLIPTextConfig(pad_token_id=tokenizer.pad_token_id, **special, **scale.clip))
        text_encoder_2 = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **scale.t5))
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=make_vae(scale, device),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=make_transformer(scale, device),
    ).to("cpu")
    print(MADE, flush=True)
    pipeline.save_pretrained(path, safe_serialization=True)
    card = {
        "name": "flux.1-dev-random",
        "sizes": [f"{side}x{side}" for side in scale.served],
        "max_sequence_length": scale.num_text_tokens,
    }
    (path / "tetriserve.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return sum(file.stat().st_size for file in path.rglob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    started_at = time.perf_counter()
    num_bytes = write_checkpoint(options.directory, scale_of(options.dry_run), device_of(options.dry_run))
    print(f"{num_bytes / 1e9:.2f} GB in {time.perf_counter() - started_at:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
