"""Qwen-Image-Edit without torch: its checkpoints are those of Qwen-Image, with a processor of pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tetriserve.core.errors import CheckpointError, InvalidRequest
from tetriserve.core.request import Shape
from tetriserve.models.card import ModelCard
from tetriserve.models.family import Family
from tetriserve.models.files import read_json
from tetriserve.models.qwen_image import facts as qwen_image

PLUS = "QwenImageEditPlusPipeline"
_MAX_PICTURE_ASPECT = 100
"""Half of what `Qwen2VLProcessor` takes: sizes are rounded after that."""
STEP_PIXELS = 1024 * 1024
"""Of a picture in the steps."""
READ_PIXELS = 384 * 384
"""Of a picture that the text encoder of Edit-Plus reads; that of Edit reads it as the steps see it."""
_MULTIPLE = 32
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def read(path: Path, pipeline_class: str, index: Mapping[str, Any]) -> ModelCard:
    """See `Family.read`."""
    card = qwen_image.read(path, pipeline_class, index)
    if not any((path / "processor" / name).is_file() for name in _PROCESSOR_FILES):
        files = " or ".join(_PROCESSOR_FILES)
        raise CheckpointError(f"{path / 'processor'} has no {files}; download the checkpoint again")
    if "vision_config" not in read_json(file := path / "text_encoder/config.json"):
        raise CheckpointError(f"{file} has no vision_config; {pipeline_class} needs an encoder that reads pictures")
    return replace(
        card,
        family="qwen_image_edit",
        num_text_tokens=qwen_image.MAX_TEXT_TOKENS,
        min_images=1,
        max_images=3 if pipeline_class == PLUS else 1,
        default_strength=None,
    )


def resized(image: Shape, num_pixels: int) -> Shape:
    """About `num_pixels` in the proportions of `image`: `calculate_dimensions` of the pipeline (tested)."""
    ratio = image.width / image.height
    width = math.sqrt(num_pixels * ratio)
    return Shape(round(width / ratio / _MULTIPLE) * _MULTIPLE, round(width / _MULTIPLE) * _MULTIPLE)


def condition_shapes(card: ModelCard, images: Sequence[Shape]) -> tuple[Shape, ...]:
    """See `Family.condition_shapes`.

    Raises:
        InvalidRequest: a picture is narrower than the processor takes.
    """
    for image in images:
        if max(image.height, image.width) > _MAX_PICTURE_ASPECT * min(image.height, image.width):
            raise InvalidRequest(
                f"a picture of {image} came along; allowed: {_MAX_PICTURE_ASPECT} times as long as wide", "image"
            )
    return tuple(resized(image, STEP_PIXELS) for image in images)


QWEN_IMAGE_EDIT = Family(
    name="qwen_image_edit",
    pipeline_classes=(PLUS, "QwenImageEditPipeline"),
    adapter="tetriserve.models.qwen_image_edit.adapter:QwenImageEditAdapter",
    components=(*qwen_image.QWEN_IMAGE.components, "processor"),
    max_text_tokens=qwen_image.MAX_TEXT_TOKENS,
    read=read,
    stages=qwen_image.stages,
    condition_shapes=condition_shapes,
    lora_components=qwen_image.QWEN_IMAGE.lora_components,
)
