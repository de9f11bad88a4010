"""What a model family is to the server: its facts, without torch. `registry` has the list of families."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetriserve.core.request import Shape, Stage
from tetriserve.models.card import ModelCard


@dataclass(frozen=True)
class Guidance:
    """What a request says of guidance. `true_cfg_scale`: of guidance by a negative prompt."""

    scale: float
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0


def image_tokens(card: ModelCard, shape: Shape) -> int:
    """Squares of `pixels_per_token` pixels a side, in each frame, or each latent frame of a video."""
    num_frames = 1 + (shape.frames - 1) // card.frame_step if card.makes_videos else shape.frames
    return (shape.height // card.pixels_per_token) * (shape.width // card.pixels_per_token) * num_frames


def _no_conditions(card: ModelCard, images: Sequence[Shape]) -> tuple[Shape, ...]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """The facts of one family; its folder has them in `facts.py`, and its adapter in `adapter.py`.

    pipeline_classes: the classes of diffusers that it serves, as `model_index.json` names them.
    takes_any_class: it may be named for other classes, too; `read` says which it cannot serve.
    adapter: `module:Class`; only workers, and their fork server, import it.
    components: without which none of its checkpoints is whole.
    max_text_tokens: to which `max_sequence_length` may be set.
    read: the card, with the family's defaults, of a checkpoint whose components are whole; from its directory, pipeline
        class and `model_index.json`. Raises CheckpointError.
    num_tokens: image tokens of one step, of a shape.
    stages: what a request of so many steps goes through.
    condition_shapes: pictures of the given shapes, as they take part in steps.
    lora_components: models that an adapter may change, as the pipeline's own loader has them; empty: it has none.
    """

    name: str
    pipeline_classes: tuple[str, ...]
    adapter: str
    components: tuple[str, ...]
    max_text_tokens: int
    read: Callable[[Path, str, Mapping[str, Any]], ModelCard]
    stages: Callable[[ModelCard, int, Guidance], tuple[Stage, ...]]
    num_tokens: Callable[[ModelCard, Shape], int] = image_tokens
    condition_shapes: Callable[[ModelCard, Sequence[Shape]], tuple[Shape, ...]] = _no_conditions
    takes_any_class: bool = False
    lora_components: tuple[str, ...] = ()
