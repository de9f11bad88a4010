"""Stable Diffusion 3 without torch: how its checkpoints are read, and what follows from their numbers."""

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
"""What `StableDiffusion3Pipeline` allows."""
_NUM_TEXT_TOKENS = 256
_LAYERS = (
    LayerNames("transformer", "num_layers", 18, "transformer_blocks"),
    LayerNames("text_encoder", "num_hidden_layers", 12, "encoder.layers"),
    LayerNames("text_encoder_2", "num_hidden_layers", 12, "encoder.layers"),
    LayerNames("text_encoder_3", "num_layers", 6, "encoder.block"),
)


def read(path: Path, pipeline_class: str, index: Mapping[str, Any]) -> ModelCard:
    """See `Family.read`. The third text encoder, T5, may be left out, as the pipeline allows."""
    encoders = [name for name in index if name.startswith("text_encoder") and index[name] != [None, None]]
    configs = {part: read_json(path / part / "config.json") for part in ("transformer", "vae", *encoders)}
    transformer, file = configs["transformer"], path / "transformer/config.json"
    num_heads = get_count({"num_attention_heads": 18, **transformer}, "num_attention_heads", int, file)
    patch = get_count({"patch_size": 2, **transformer}, "patch_size", int, file)
    most_patches = get_count({"pos_embed_max_size": 96, **transformer}, "pos_embed_max_size", int, file)
    sample_size = get_count({"sample_size": 128, **transformer}, "sample_size", int, file)
    scale = vae_scale(path)
    check_flow_matching(path)
    check_vae_factors(path)
    check_channels(path, transformer, latent_channels(path), 16, pipeline_class, "(latent_channels of the vae)")
    clip = [configs[name].get("projection_dim", 512) for name in ("text_encoder", "text_encoder_2")]
    check_text_width(path, "pooled_projection_dim", 2048, sum(clip), "text_encoder with text_encoder_2")
    if "text_encoder_3" in configs:
        width = configs["text_encoder_3"].get("d_model", 512)
        check_text_width(path, "joint_attention_dim", 4096, width, "text_encoder_3")
    check_clip_length(path)
    check_clip_length(path, "tokenizer_2", "text_encoder_2")
    check_layers(path, index, [each for each in _LAYERS if each.component in configs])
    max_side = most_patches * patch * scale
    sizes = square_sizes(min(sample_size, most_patches * patch) * scale, patch * scale)
    return ModelCard(
        name=hub_name(path),
        path=path,
        family="sd3",
        pipeline_class=pipeline_class,
        execution=Execution("bfloat16"),
        size_multiple=patch * scale,
        pixels_per_token=patch * scale,
        num_heads=num_heads,
        num_text_tokens=_NUM_TEXT_TOKENS,
        default_num_steps=28,
        default_guidance_scale=7.0,
        has_guidance=True,
        has_negative_prompt=True,
        max_images=1,
        default_strength=0.6,
        guides_by_passes=True,
        sizes=tuple(size for size in sizes if size.height <= max_side),
        max_side=max_side,
        fingerprint=fingerprint(*configs.values()),
    )


def stages(card: ModelCard, num_steps: int, guidance: Guidance) -> tuple[Stage, ...]:
    """See `Family.stages`. Guidance above 1 takes a second pass, for the negative prompt or an empty one."""
    return image_stages(num_steps, 2 if guidance.scale > 1 else 1)


SD3 = Family(
    name="sd3",
    pipeline_classes=("StableDiffusion3Pipeline",),
    adapter="tetriserve.models.sd3.adapter:SD3Adapter",
    components=("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae"),
    max_text_tokens=_MAX_TEXT_TOKENS,
    read=read,
    stages=stages,
    lora_components=("transformer", "text_encoder", "text_encoder_2"),
)
