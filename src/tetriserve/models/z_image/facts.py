"""Z-Image without torch: how its checkpoints are read, and what follows from their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tetriserve.core.errors import CheckpointError
from tetriserve.core.execution import Execution
from tetriserve.core.request import MAX_SIDE, Stage
from tetriserve.core.stages import image_stages
from tetriserve.models.card import ModelCard
from tetriserve.models.components import (
    check_channels,
    check_chat_template,
    check_flow_matching,
    check_text_width,
    check_vae_factors,
    latent_channels,
    square_sizes,
    vae_scale,
)
from tetriserve.models.family import Family, Guidance
from tetriserve.models.files import LayerNames, check_layers, fingerprint, get, get_count, hub_name, quoted, read_json

_MAX_TEXT_TOKENS = 512
"""The default of `ZImagePipeline`."""
_DEFAULT_SIDE = 1024
_PATCH = 2
_TURBO_SHIFT = 3.0
"""Of the scheduler of Z-Image-Turbo; that of Z-Image is 6."""
_LAYERS = (
    LayerNames("transformer", "n_layers", 30, "layers"),
    LayerNames("transformer", "n_refiner_layers", 2, "noise_refiner"),
    LayerNames("transformer", "n_refiner_layers", 2, "context_refiner"),
    LayerNames("text_encoder", "num_hidden_layers", 32, "layers"),
)


def read(path: Path, pipeline_class: str, index: Mapping[str, Any]) -> ModelCard:
    """See `Family.read`. No file says which of the two models it is: the name does, or else the scheduler's shift."""
    transformer, vae, text_encoder = (
        read_json(path / part / "config.json") for part in ("transformer", "vae", "text_encoder")
    )
    file, scale = path / "transformer/config.json", vae_scale(path)
    num_heads = get_count({"n_heads": 30, **transformer}, "n_heads", int, file)
    check_flow_matching(path)
    check_vae_factors(path)
    check_channels(path, transformer, latent_channels(path), 16, pipeline_class, "(latent_channels of the vae)")
    check_text_width(path, "cap_feat_dim", 2560, text_encoder.get("hidden_size", 4096), "text_encoder")
    check_chat_template(path)
    check_layers(path, index, _LAYERS)
    side = _PATCH * scale
    max_side = min(_positions(transformer, file)[1:]) * side
    return ModelCard(
        name=hub_name(path),
        path=path,
        family="z_image",
        pipeline_class=pipeline_class,
        execution=Execution("bfloat16"),
        size_multiple=side,
        pixels_per_token=side,
        num_heads=num_heads,
        num_text_tokens=_MAX_TEXT_TOKENS,
        default_num_steps=8 if (is_turbo := _is_turbo(path)) else 50,
        default_guidance_scale=0.0 if is_turbo else 5.0,
        has_guidance=True,
        has_negative_prompt=True,
        guides_by_passes=True,
        max_images=1,
        default_strength=0.6,
        passes_above=0.0,
        sizes=tuple(size for size in square_sizes(_DEFAULT_SIDE, side) if size.height <= max_side),
        max_side=min(max_side, MAX_SIDE),
        fingerprint=fingerprint(transformer, vae, text_encoder),
    )


def stages(card: ModelCard, num_steps: int, guidance: Guidance) -> tuple[Stage, ...]:
    """See `Family.stages`. Any guidance takes a second pass, for the negative prompt or an empty one."""
    return image_stages(num_steps, 2 if guidance.scale > 0 else 1)


def _is_turbo(path: Path) -> bool:
    shift = read_json(path / "scheduler/scheduler_config.json").get("shift", 1.0)
    return "turbo" in hub_name(path).lower() or shift == _TURBO_SHIFT


def _positions(transformer: Mapping[str, Any], file: Path) -> list[int]:
    """How many places the model knows along a text, and along the height and the width of an image, in tokens.

    Raises:
        CheckpointError: they do not suffice for texts, or ranks cannot divide the model.
    """
    lengths: list[int] = get({"axes_lens": [1024, 512, 512], **transformer}, "axes_lens", list, file)
    if len(lengths) != 3 or not all(isinstance(each, int) and each > 0 for each in lengths):
        raise CheckpointError(f"{file}: axes_lens is {quoted(lengths)}; it must be three numbers above 0")
    if lengths[0] < _MAX_TEXT_TOKENS + 2:  # texts begin at 1, and the image stands after them
        raise CheckpointError(
            f"{file}: axes_lens is {quoted(lengths)}; the first must be {_MAX_TEXT_TOKENS + 2} or more"
        )
    if get_count({"n_refiner_layers": 2, **transformer}, "n_refiner_layers", int, file) < 2:
        raise CheckpointError(f"{file}: n_refiner_layers is {transformer['n_refiner_layers']}; it must be 2 or more")
    return lengths


Z_IMAGE = Family(
    name="z_image",
    pipeline_classes=("ZImagePipeline",),
    adapter="tetriserve.models.z_image.adapter:ZImageAdapter",
    components=("scheduler", "text_encoder", "tokenizer", "transformer", "vae"),
    max_text_tokens=_MAX_TEXT_TOKENS,
    read=read,
    stages=stages,
    lora_components=("transformer",),
)
