"""FLUX.2 without torch: how its checkpoints are read, and what follows from their numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tetriserve.core.errors import CheckpointError, InvalidRequest
from tetriserve.core.execution import Execution
from tetriserve.core.request import Shape, Stage
from tetriserve.core.stages import image_stages
from tetriserve.models.card import ModelCard
from tetriserve.models.components import (
    check_channels,
    check_chat_template,
    check_flow_matching,
    check_text_width,
    latent_channels,
    square_sizes,
    vae_scale,
)
from tetriserve.models.family import Family, Guidance
from tetriserve.models.files import LayerNames, check_layers, fingerprint, get_count, hub_name, read_json

DEV, KLEIN = "Flux2Pipeline", "Flux2KleinPipeline"
_MAX_TEXT_TOKENS = 512
"""The default of both pipelines."""
_DEFAULT_SIDE = 1024
_PATCH = 2
_MAX_PICTURES = 4
_MAX_PICTURE_PIXELS = 1024 * 1024
"""To which the pipelines shrink larger pictures."""
_MIN_PICTURE_SIDE = 64
_MAX_PICTURE_ASPECT = 8
_USED_LAYERS = {DEV: (10, 20, 30), KLEIN: (9, 18, 27)}
"""Layers of the text encoder after which its states are an embedding, one after the other."""
_LAYERS = (
    LayerNames("transformer", "num_layers", 8, "transformer_blocks"),
    LayerNames("transformer", "num_single_layers", 48, "single_transformer_blocks"),
    LayerNames("text_encoder", "num_hidden_layers", 32, "layers"),
)


def read(path: Path, pipeline_class: str, index: Mapping[str, Any]) -> ModelCard:
    """See `Family.read`. Of klein, `is_distilled` in `model_index.json` tells the model of few steps from the base."""
    transformer, vae, text_encoder = (
        read_json(path / part / "config.json") for part in ("transformer", "vae", "text_encoder")
    )
    scale = vae_scale(path)
    file = path / "transformer/config.json"
    num_heads = get_count({"num_attention_heads": 48, **transformer}, "num_attention_heads", int, file)
    check_flow_matching(path)
    check_channels(
        path, transformer, _PATCH**2 * latent_channels(path, default=32), 128, pipeline_class,
        "(4 times latent_channels of the vae)",
    )  # fmt: skip
    _check_encoder(path, text_encoder.get("text_config", text_encoder), _USED_LAYERS[pipeline_class])
    check_chat_template(path)
    check_layers(path, index, _LAYERS)
    is_distilled = pipeline_class == KLEIN and bool(index.get("is_distilled", False))
    return ModelCard(
        name=hub_name(path),
        path=path,
        family="flux2",
        pipeline_class=pipeline_class,
        execution=Execution("bfloat16"),
        size_multiple=_PATCH * scale,
        pixels_per_token=_PATCH * scale,
        num_heads=num_heads,
        num_text_tokens=_MAX_TEXT_TOKENS,
        default_num_steps=4 if is_distilled else 50,
        default_guidance_scale=1.0 if is_distilled else 4.0,
        has_guidance=not is_distilled,
        has_negative_prompt=False,
        max_images=_MAX_PICTURES,
        guides_by_passes=pipeline_class == KLEIN and not is_distilled,
        sizes=square_sizes(_DEFAULT_SIDE, _PATCH * scale),
        fingerprint=fingerprint(transformer, vae, text_encoder),
    )


def stages(card: ModelCard, num_steps: int, guidance: Guidance) -> tuple[Stage, ...]:
    """See `Family.stages`. Only klein's base model has a second pass, for an empty text; dev's scale is an input."""
    return image_stages(num_steps, 2 if card.guides_by_passes and guidance.scale > 1 else 1)


def condition_shapes(card: ModelCard, images: Sequence[Shape]) -> tuple[Shape, ...]:
    """See `Family.condition_shapes`: shrunk to a megapixel, then cropped to whole tokens.

    Raises:
        InvalidRequest: a picture is smaller or narrower than the pipelines take.
    """
    shapes, multiple = [], card.size_multiple
    for image in images:
        height, width = image.height, image.width
        if min(height, width) < _MIN_PICTURE_SIDE or max(height, width) > _MAX_PICTURE_ASPECT * min(height, width):
            allowed = f"at least {_MIN_PICTURE_SIDE} pixels a side, and {_MAX_PICTURE_ASPECT} times as long as wide"
            raise InvalidRequest(f"a picture of {image} came along; allowed: {allowed}", "image")
        if image.num_pixels > _MAX_PICTURE_PIXELS:
            scale = math.sqrt(_MAX_PICTURE_PIXELS / image.num_pixels)
            height, width = int(height * scale), int(width * scale)
        shapes.append(Shape(height // multiple * multiple, width // multiple * multiple))
    return tuple(shapes)


def _check_encoder(path: Path, text_encoder: Mapping[str, Any], layers: tuple[int, ...]) -> None:
    file = path / "text_encoder/config.json"
    width = get_count({"hidden_size": 4096, **text_encoder}, "hidden_size", int, file)
    check_text_width(path, "joint_attention_dim", 15360, len(layers) * width, "text_encoder")
    num_layers = get_count({"num_hidden_layers": 32, **text_encoder}, "num_hidden_layers", int, file)
    if num_layers < layers[-1]:
        raise CheckpointError(
            f"{file}: num_hidden_layers is {num_layers}, but the states after layer {layers[-1]} are needed"
        )


FLUX2 = Family(
    name="flux2",
    pipeline_classes=(DEV, KLEIN),
    adapter="tetriserve.models.flux2.adapter:Flux2Adapter",
    components=("scheduler", "text_encoder", "tokenizer", "transformer", "vae"),
    max_text_tokens=_MAX_TEXT_TOKENS,
    read=read,
    stages=stages,
    condition_shapes=condition_shapes,
    lora_components=("transformer",),
)
