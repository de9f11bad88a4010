"""Memory that the weights of published models take on a rank, computed from their configurations; nothing is loaded.

    python benchmarks/model_memory.py

The numbers below are those of the published `config.json` files as far as they are known here, where no checkpoint can
be had: the parameters that they give agree with the sizes that the models are published under. Models are built on
torch's `meta` device and their parameters counted, in bfloat16. Activations come on top.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
import transformers

_BYTES = 2
Make = Callable[[], Any]


def _sd3(num_layers: int, **options: Any) -> Make:
    return lambda: diffusers.SD3Transformer2DModel(
        num_layers=num_layers, num_attention_heads=num_layers, caption_projection_dim=64 * num_layers, **options
    )


def _flux2(num_layers: int, num_single_layers: int, num_heads: int, text_width: int) -> Make:
    return lambda: diffusers.Flux2Transformer2DModel(
        num_layers=num_layers, num_single_layers=num_single_layers, num_attention_heads=num_heads,
        joint_attention_dim=text_width, guidance_embeds=num_heads == 48,
    )  # fmt: skip


def _vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=16,
    )  # fmt: skip


def _t5_xxl() -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def _clip(width: int, num_layers: int) -> Make:
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=num_layers,
        num_attention_heads=width // 64, projection_dim=width,
    )  # fmt: skip
    return lambda: transformers.CLIPTextModelWithProjection(config)


def _qwen3(width: int, mlp_width: int) -> Make:
    config = transformers.Qwen3Config(
        vocab_size=151936, hidden_size=width, intermediate_size=mlp_width, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    return lambda: transformers.Qwen3Model(config)


def _qwen2_5_vl() -> Any:
    text = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _mistral3() -> Any:
    text = {
        "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "head_dim": 64,
    }  # fmt: skip
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config=vision)
    )


_FLUX_ENCODERS = {"CLIP L": _clip(768, 12), "T5 XXL": _t5_xxl}
_SD3_ENCODERS = {"CLIP L": _clip(768, 12), "CLIP G": _clip(1280, 32), "T5 XXL": _t5_xxl}
MODELS: Mapping[str, tuple[Make, Make, Mapping[str, Make]]] = {
    "FLUX.1 dev, Kontext": (lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True), _vae, _FLUX_ENCODERS),
    "FLUX.1 schnell": (diffusers.FluxTransformer2DModel, _vae, _FLUX_ENCODERS),
    "SD3 medium": (_sd3(24, pos_embed_max_size=192), _vae, _SD3_ENCODERS),
    "SD3.5 medium": (
        _sd3(24, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
        _vae,
        _SD3_ENCODERS,
    ),
    "SD3.5 large": (_sd3(38, pos_embed_max_size=192, qk_norm="rms_norm"), _vae, _SD3_ENCODERS),
    "Qwen-Image, -Edit": (
        diffusers.QwenImageTransformer2DModel,
        diffusers.AutoencoderKLQwenImage,
        {"Qwen2.5-VL 7B": _qwen2_5_vl},
    ),
    "FLUX.2 dev": (_flux2(8, 48, 48, 15360), diffusers.AutoencoderKLFlux2, {"Mistral Small 3": _mistral3}),
    "FLUX.2 klein 4B": (_flux2(5, 20, 24, 7680), diffusers.AutoencoderKLFlux2, {"Qwen3 4B": _qwen3(2560, 9728)}),
    "FLUX.2 klein 9B": (_flux2(8, 24, 32, 12288), diffusers.AutoencoderKLFlux2, {"Qwen3 8B": _qwen3(4096, 12288)}),
    "Z-Image, Turbo": (diffusers.ZImageTransformer2DModel, _vae, {"Qwen3 4B": _qwen3(2560, 9728)}),
}
"""Transformer, VAE and text encoders."""


def num_parameters(make: Make) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


def main() -> None:
    print("GB of weights in bfloat16: on a rank with text encoders, and on one without (--encoder-ranks)\n")
    print(f"{'model':20} {'transformer':>11} {'VAE':>5} {'encoders':>8} {'with':>6} {'without':>7}")
    for name, (transformer, vae, encoders) in MODELS.items():
        parts = [num_parameters(transformer), num_parameters(vae), sum(map(num_parameters, encoders.values()))]
        gb = [part * _BYTES / 1e9 for part in parts]
        print(f"{name:20} {gb[0]:11.1f} {gb[1]:5.1f} {gb[2]:8.1f} {sum(gb):6.1f} {gb[0] + gb[1]:7.1f}")


if __name__ == "__main__":
    main()
