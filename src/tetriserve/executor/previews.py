"""Previews of images on their way, from what tasks leave in the store: no rank works for them."""

from __future__ import annotations

from tetriserve.core.events import TensorRef
from tetriserve.core.request import Request
from tetriserve.executor.protocol import Preview
from tetriserve.models.card import ModelCard
from tetriserve.models.preview import Latents, project
from tetriserve.worker.store import TensorStore


class PreviewReader:
    """`basis` names the matrix of `models.preview` once a worker has left it."""

    def __init__(self, store: TensorStore, card: ModelCard) -> None:
        self._store = store
        self._side = card.pixels_per_token
        self.basis: TensorRef | None = None

    def read(self, request: Request, latents: TensorRef, before: Latents | None) -> Preview | None:
        """See `Executor.read_preview`."""
        if self.basis is None:
            return None
        try:
            basis = self._store.load_numpy(self.basis)["basis"]
            tensors = self._store.load_numpy(latents)
        except OSError:
            return None  # the next task has ended meanwhile, and its result has taken the place of this one's
        now = Latents(tensors["latents"][0].astype("float32"), float(tensors["noise_level"]))
        num_rows, num_columns = request.shape.height // self._side, request.shape.width // self._side
        return Preview(project(basis, now, before, num_rows, num_columns), now)
