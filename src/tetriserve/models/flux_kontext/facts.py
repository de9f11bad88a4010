"""FLUX.1 Kontext without torch: its checkpoints are those of FLUX.1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tetriserve.core.request import Shape
from tetriserve.models.card import ModelCard
from tetriserve.models.family import Family
from tetriserve.models.flux import facts as flux

RESOLUTIONS = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688),
    (1568, 672),
)  # fmt: skip
"""Width and height of the pictures that it was trained on: `PREFERRED_KONTEXT_RESOLUTIONS` of diffusers (tested)."""


def read(path: Path, pipeline_class: str, index: Mapping[str, Any]) -> ModelCard:
    """See `Family.read`."""
    card = flux.read(path, pipeline_class, index)
    return replace(card, family="flux_kontext", default_strength=None)


def condition_shapes(card: ModelCard, images: Sequence[Shape]) -> tuple[Shape, ...]:
    """See `Family.condition_shapes`: the resolution of the nearest aspect."""
    multiple = card.size_multiple
    shapes = []
    for image in images:
        aspect = (image.width // multiple) / (image.height // multiple)
        _, width, height = min((abs(aspect - width / height), width, height) for width, height in RESOLUTIONS)
        shapes.append(Shape(height // multiple * multiple, width // multiple * multiple))
    return tuple(shapes)


FLUX_KONTEXT = Family(
    name="flux_kontext",
    pipeline_classes=("FluxKontextPipeline",),
    adapter="tetriserve.models.flux_kontext.adapter:FluxKontextAdapter",
    components=flux.FLUX.components,
    max_text_tokens=flux.FLUX.max_text_tokens,
    read=read,
    stages=flux.stages,
    condition_shapes=condition_shapes,
    lora_components=flux.FLUX.lora_components,
)
