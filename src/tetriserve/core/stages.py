"""The stages of what families make."""

from __future__ import annotations

from tetriserve.core.request import Stage

ENCODE, DENOISE, DECODE = "encode", "denoise", "decode"


def image_stages(num_steps: int) -> tuple[Stage, ...]:
    """An image or a video from text: its prompt is encoded, latents are denoised in `num_steps` steps and decoded."""
    return Stage(ENCODE), Stage(DENOISE, num_steps), Stage(DECODE)
