"""Previews of images on their way, from what tasks leave in the store: no rank works for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tetriserve.core.events import TensorRef
from tetriserve.core.models import of_model
from tetriserve.core.request import Request
from tetriserve.executor.protocol import Executor
from tetriserve.models.card import ModelCard
from tetriserve.worker.bundle import arrays_of

if TYPE_CHECKING:
    import numpy as np

    from tetriserve.models.preview import Latents


@dataclass(frozen=True)
class Preview:
    """pixels: uint8, small, of the image's proportions. latents: what they were made from."""

    pixels: np.ndarray
    latents: Latents


class PreviewReader:
    """Any thread may use it."""

    def __init__(self, executor: Executor, cards: Mapping[str, ModelCard]) -> None:
        """`cards` are of the models, by their keys."""
        self._executor = executor
        self._cards = cards

    def read(self, request: Request, latents: TensorRef, before: Latents | None) -> Preview | None:
        """What the latents that a task left behind will look like; None if that cannot be said.

        It takes a millisecond or two. `before` is what an earlier call for the same request returned the latents of.
        """
        from tetriserve.models.preview import Latents, project

        states, card = self._executor.states, of_model(self._cards, request.model)
        basis_ref = self._executor.preview_bases.get(card.key)
        if basis_ref is None:
            return None
        side = card.pixels_per_token
        try:
            basis = arrays_of(states.get(basis_ref))["basis"]
            tensors = arrays_of(states.get(latents))
        except OSError:
            return None  # the next task has ended meanwhile, and its result has taken the place of this one's
        num_rows, num_columns = request.shape.height // side, request.shape.width // side
        now = Latents.of(tensors["latents"], float(tensors["noise_level"]), num_rows)
        return Preview(project(basis, now, before, num_rows, num_columns), now)
