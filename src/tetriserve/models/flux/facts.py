"""FLUX without torch: how its checkpoints are read, and what follows from their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tetriserve.core.execution import Execution
from tetriserve.core.request import Stage
from tetriserve.core.stages import image_stages
from tetriserve.models.card import ModelCard
from tetriserve.models.components import (
    check_channels,
    check_clip_length,
    check_flow_matching,
    check_text_width,
    check_vae_factors,
    latent_channels,
    square_sizes,
    vae_scale,
)
from tetriserve.models.family import Family, Guidance
from tetriserve.models.files import LayerNames, check_layers, fingerprint, get_count, hub_name, read_json

_MAX_TEXT_TOKENS = 512
"""What `FluxPipeline` allows, and its default."""
_DEFAULT_SAMPLE_SIZE = 128
"""Side in latents of the picture that `FluxPipeline` draws where no size is asked for."""
_LAYERS = (
    LayerNames("transformer", "num_layers", 19, "transformer_blocks"),
    LayerNames("transformer", "num_single_layers", 38, "single_transformer_blocks"),
    LayerNames("text_encoder", "num_hidden_layers", 12, "encoder.layers"),
    LayerNames("text_encoder_2", "num_layers", 6, "encoder.block"),
)


def read(path: Path, pipeline_class: str, index: Mapping[str, Any]) -> ModelCard:
    """See `Family.read`."""
    transformer, vae, text_encoder, text_encoder_2 = (
        read_json(path / part / "config.json") for part in ("transformer", "vae", "text_encoder", "text_encoder_2")
    )
    has_guidance = bool(transformer.get("guidance_embeds", False))
    scale = vae_scale(path)
    num_heads = get_count(transformer, "num_attention_heads", int, path / "transformer/config.json")
    check_flow_matching(path)
    check_vae_factors(path)
    check_channels(
        path, transformer, 4 * latent_channels(path), 64, pipeline_class,
        "(4 times latent_channels of the vae); FLUX Fill, Canny and Depth need pipelines that are not served",
    )  # fmt: skip
    check_text_width(path, "pooled_projection_dim", 768, text_encoder.get("hidden_size", 512), "text_encoder")
    check_text_width(path, "joint_attention_dim", 4096, text_encoder_2.get("d_model", 512), "text_encoder_2")
    check_clip_length(path)
    check_layers(path, index, _LAYERS)
    return ModelCard(
        name=hub_name(path),
        path=path,
        family="flux",
        pipeline_class=pipeline_class,
        execution=Execution("bfloat16"),
        size_multiple=2 * scale,
        pixels_per_token=2 * scale,
        num_heads=num_heads,
        num_text_tokens=_MAX_TEXT_TOKENS,
        default_num_steps=28 if has_guidance else 4,
        default_guidance_scale=3.5,
        has_guidance=has_guidance,
        has_negative_prompt=True,
        max_images=1,
        default_strength=0.6,
        sizes=square_sizes(_DEFAULT_SAMPLE_SIZE * scale, 2 * scale),
        fingerprint=fingerprint(transformer, vae, text_encoder, text_encoder_2),
    )


def stages(card: ModelCard, num_steps: int, guidance: Guidance) -> tuple[Stage, ...]:
    """See `Family.stages`. Guidance by a negative prompt takes a second pass at each step; the scale is an input."""
    has_second_pass = guidance.negative_prompt is not None and guidance.true_cfg_scale > 1
    return image_stages(num_steps, 2 if has_second_pass else 1)


FLUX = Family(
    name="flux",
    pipeline_classes=("FluxPipeline",),
    adapter="tetriserve.models.flux.adapter:FluxAdapter",
    components=("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae"),
    max_text_tokens=_MAX_TEXT_TOKENS,
    read=read,
    stages=stages,
    lora_components=("transformer", "text_encoder"),
)
