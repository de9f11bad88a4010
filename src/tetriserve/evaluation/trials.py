"""What became of prompts under one setting, and how often it was right."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image

from tetriserve.evaluation.prompts import Prompt
from tetriserve.evaluation.reading import read_image
from tetriserve.evaluation.scoring import Score, score_reading


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One prompt with what was drawn, as PNG: thousands are kept, and drawings compress well."""

    prompt: Prompt
    png: bytes
    score: Score

    @property
    def image(self) -> Image.Image:
        return Image.open(io.BytesIO(self.png))

    @property
    def is_right(self) -> bool:
        return self.score.objects and self.score.relations is not False


@dataclass(frozen=True, kw_only=True)
class Share:
    """How many of `total` are right."""

    right: int
    total: int

    @property
    def percent(self) -> float:
        return 100 * self.right / self.total


def try_prompt(prompt: Prompt, image: Image.Image) -> Trial:
    """What `image` shows, held against what `prompt` asks for."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return Trial(prompt=prompt, png=buffer.getvalue(), score=score_reading(prompt.scene, read_image(np.asarray(image))))


def shares(trials: Sequence[Trial]) -> dict[str, Share]:
    """For each kind of question (`Score`'s fields) that any of the prompts asks, how many answers are right."""
    answers = {
        field.name: [answer for trial in trials if (answer := getattr(trial.score, field.name)) is not None]
        for field in fields(Score)
    }
    return {name: Share(right=sum(given), total=len(given)) for name, given in answers.items() if given}


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of 8-bit RGB images of one size; infinite if they are equal."""
    difference = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    error = float(np.mean(difference**2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
