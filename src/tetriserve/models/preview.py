"""Small pictures from latents on their way: one matrix instead of a VAE, numpy instead of torch.

A latent token stands for a square of pixels, and the colours of that square are, roughly, a linear function of the
token (the idea is that of the latent previews of Stable Diffusion's user interfaces). The matrix is the least-squares
fit between simple pictures, shrunk, and the latents that the model's own VAE makes of them.

Half-way, latents are mostly noise. Models of this kind are trained to move along straight lines from noise to picture
(flow matching): x = (1 - s) * picture + s * noise at noise level s. Two points of the way give its direction, and the
picture that it leads to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tetriserve.models.adapter import Adapter
    from tetriserve.models.card import ModelCard

Floats = npt.NDArray[np.floating]
Pixels = npt.NDArray[np.uint8]

PATCH = 2
"""Pixels of a preview along each side of a token."""
_NUM_PICTURES = 6
_TOKENS_PER_SIDE = 8
_SEED = 7


@dataclass(frozen=True)
class Latents:
    """tokens: (S, C), row by row. noise_level: 1 is noise alone, 0 the finished picture."""

    tokens: Floats
    noise_level: float

    @classmethod
    def of(cls, latents: Floats, noise_level: float, num_rows: int) -> Latents:
        """Of what a task leaves, (1, S, C) or (1, C, H, W), for an image of `num_rows` rows of tokens."""
        if latents.ndim == 3:
            return cls(latents[0].astype(np.float32), noise_level)
        num_channels, height, _ = latents.shape[1:]
        side = height // num_rows
        squares = latents[0].reshape(num_channels, num_rows, side, -1, side).transpose(1, 3, 0, 2, 4)
        return cls(squares.reshape(-1, num_channels * side * side).astype(np.float32), noise_level)


def fit_basis(adapter: Adapter, card: ModelCard) -> Floats:
    """The matrix (C + 1, PATCH * PATCH * 3) from a token and 1 to the colours of its square, 0 to 1.

    Encodes `_NUM_PICTURES` pictures: tens of milliseconds for a small model.
    """
    tokens, colours = [], []
    for pixels in _simple_pictures(card.pixels_per_token * _TOKENS_PER_SIDE):
        tokens.append(Latents.of(adapter.latents_of(pixels).float().cpu().numpy(), 0.0, _TOKENS_PER_SIDE).tokens)
        colours.append(_colours(pixels, card.pixels_per_token // PATCH))
    basis, *_ = np.linalg.lstsq(_with_one(np.concatenate(tokens)), np.concatenate(colours), rcond=1e-4)
    return np.asarray(basis, dtype=np.float32)


def project(basis: Floats, latents: Latents, before: Latents | None, num_rows: int, num_columns: int) -> Pixels:
    """The picture that `latents` lead to, (num_rows * PATCH, num_columns * PATCH, 3).

    Args:
        before: latents of an earlier step, by which the noise is told from the picture; without them it stays in.
        num_rows, num_columns: tokens along the sides of the image.
    """
    colours = _with_one(_without_noise(latents, before)) @ basis
    squares = colours.reshape(num_rows, num_columns, PATCH, PATCH, 3).transpose(0, 2, 1, 3, 4)
    picture = squares.reshape(num_rows * PATCH, num_columns * PATCH, 3)
    return (np.clip(picture, 0.0, 1.0) * 255).round().astype(np.uint8)


def _without_noise(latents: Latents, before: Latents | None) -> Floats:
    level = latents.noise_level
    if before is None or not before.noise_level > level > 0:
        return latents.tokens
    direction = (before.tokens - latents.tokens) / (before.noise_level - level)
    return latents.tokens - level * direction


def _with_one(tokens: Floats) -> Floats:
    return np.concatenate([tokens, np.ones((len(tokens), 1), tokens.dtype)], axis=1)


def _simple_pictures(side: int) -> list[Pixels]:
    """Gradients between random colours, with random rectangles."""
    dice = np.random.default_rng(_SEED)
    ramp = np.linspace(0.0, 1.0, side)
    pictures = []
    for _ in range(_NUM_PICTURES):
        corners = dice.uniform(0, 255, (2, 2, 3))
        left, right = (corners[0, i] + np.multiply.outer(ramp, corners[1, i] - corners[0, i]) for i in (0, 1))
        picture = left[:, None] + ramp[None, :, None] * (right - left)[:, None]
        for _ in range(4):
            (top, bottom), (first, last) = (np.sort(dice.integers(0, side + 1, 2)) for _ in range(2))
            picture[top:bottom, first:last] = dice.uniform(0, 255, 3)
        pictures.append(picture.astype(np.uint8))
    return pictures


def _colours(pixels: Pixels, side: int) -> Floats:
    """Mean colours of the squares of `side` pixels, by token: (S, PATCH * PATCH * 3), 0 to 1."""
    small = pixels.reshape(len(pixels) // side, side, -1, side, 3).mean(axis=(1, 3)) / 255
    by_token = small.reshape(len(small) // PATCH, PATCH, -1, PATCH, 3).transpose(0, 2, 1, 3, 4)
    return np.asarray(by_token.reshape(-1, PATCH * PATCH * 3))
