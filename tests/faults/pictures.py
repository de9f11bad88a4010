"""The pictures that clients ask for, and how each has to look."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.launch import find_model

TOLERANCE = 1
"""Of 255, in every channel of every pixel."""
_PROMPTS = (
    "a red circle above a blue square on a white background",
    "a small green triangle left of a big yellow star",
    "a purple square on a black background",
    "an orange circle right of a white triangle on a blue background",
    "a blue star below a red triangle",
    "a yellow square and a green circle on a grey background",
)
_FIRST_SEED = 3
"""Of seeds with which no two pictures look alike: at so few steps the bundled model may draw nothing at all."""


@dataclass(frozen=True, slots=True)
class Picture:
    prompt: str
    size: str
    seed: int
    num_steps: int


def make_catalogue() -> tuple[tuple[Picture, Picture], ...]:
    """Pairs that differ by one in their seeds: what a call with n = 2 answers with."""
    kinds = (("256x256", 4), ("256x256", 8), ("512x512", 5), ("256x256", 12), ("512x512", 6))
    pairs = []
    for number in range(15):
        size, num_steps = kinds[number % len(kinds)]
        prompt, seed = _PROMPTS[number % len(_PROMPTS)], _FIRST_SEED + 100 * number
        pairs.append((Picture(prompt, size, seed, num_steps), Picture(prompt, size, seed + 1, num_steps)))
    return tuple(pairs)


class Gallery:
    """Every picture as one undisturbed process computes it at degree 1."""

    def __init__(self, references: Mapping[Picture, np.ndarray]) -> None:
        """No two references may look the same, or one could pass for the other."""
        self._references = references
        pixels = list(references.values())
        for number, one in enumerate(pixels):
            assert all(one.shape != other.shape or _distance(one, other) > 2 * TOLERANCE for other in pixels[:number])

    @classmethod
    def paint(cls, pictures: Sequence[Picture]) -> Gallery:
        import torch

        from tetriserve.models.flux.adapter import FluxAdapter

        torch.set_num_threads(1)
        adapter = FluxAdapter(find_model(None), "cpu")
        references: dict[Picture, np.ndarray] = {}
        for picture in pictures:
            request = Request(
                request_id="reference", prompt=picture.prompt, shape=Shape.parse(picture.size),
                stages=image_stages(picture.num_steps), seed=picture.seed, arrival_s=0.0, deadline_s=0.0,
            )  # fmt: skip
            with torch.no_grad():
                loop = adapter.denoise_loop(request, adapter.encode(request), 0)
                latents = adapter.initial_latents(request)
                for _ in range(request.num_steps):
                    latents = loop.step(latents)
                pixels = adapter.decode(request, latents)
            assert pixels is not None, "it was decoded by one rank alone"
            references[picture] = pixels
        return cls(references)

    def distance(self, picture: Picture, png: bytes) -> int:
        """The largest difference of any channel of any pixel from the reference, 0 to 255."""
        pixels, reference = np.asarray(Image.open(io.BytesIO(png))), self._references[picture]
        return _distance(pixels, reference) if pixels.shape == reference.shape else 255


def _distance(pixels: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(pixels.astype(np.int16) - other).max())
