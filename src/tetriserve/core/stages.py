"""The stages of what families make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tetriserve.core.cluster import ANYWHERE, StageRanks
from tetriserve.core.request import Shape, Stage

ENCODE, ENCODE_IMAGE, DENOISE, DECODE = "encode", "encode_image", "denoise", "decode"
ADAPTED = frozenset((ENCODE, DENOISE))
"""Stages whose models a LoRA changes. A task of another stage leaves its ranks' adapters as they are."""
INPUT = "input"
"""No stage: the name of the state that a request brings along, the pictures that came with its prompt."""


def encoders_on_first(num_encoders: int | None, num_ranks: int) -> StageRanks:
    """What ranks may run if only the first `num_encoders` hold text encoders; None: all do."""
    if num_encoders is None or num_encoders >= num_ranks:
        return ANYWHERE
    return StageRanks.of({("", ENCODE): range(num_encoders)})


def image_stages(num_steps: int, num_passes: int = 1) -> tuple[Stage, ...]:
    """An image or a video from text: its prompt is encoded, latents are denoised in `num_steps` steps and decoded.

    num_passes: 2 where a second prompt takes part in guidance: both are encoded, and each step is made for both.
    """
    return Stage(ENCODE, 0, num_passes), Stage(DENOISE, num_steps, num_passes), Stage(DECODE)


def from_images(
    stages: Sequence[Stage], num_images: int, encoded: Shape | None = None, step: Shape | None = None
) -> tuple[Stage, ...]:
    """`stages` for a request that brings `num_images` pictures: they are encoded after its prompt.

    encoded: of the first, as it is encoded; None is the output's.
    step: takes as long in each step as the output and the pictures together; None where they take no part in steps.
    """
    prompt, *others = stages
    return (
        prompt,
        Stage(ENCODE_IMAGE, 0, num_images, encoded),
        *(replace(stage, shape=step) if stage.kind == DENOISE else stage for stage in others),
    )
