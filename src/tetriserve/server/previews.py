"""Previews of one image at the size that its client asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tetriserve.core.request import Request
from tetriserve.engine import LiveEngine, Progress

if TYPE_CHECKING:
    from tetriserve.models.preview import Latents


class PreviewMaker:
    """At most `num_wanted` previews, spread evenly over the steps as far as tasks end there."""

    def __init__(self, engine: LiveEngine, request: Request, num_wanted: int) -> None:
        self._engine = engine
        self._request = request
        self._num_wanted = num_wanted
        self._num_made = 0
        self._before: Latents | None = None

    def make(self, progress: Progress) -> np.ndarray | None:
        """Pixels, uint8, (height, width, 3), if a preview is due and can be made. Call it off the event loop."""
        request = self._request
        if progress.latents is None or self._num_made == self._num_wanted:
            return None
        preview = self._engine.previews.read(request, progress.latents, self._before)
        if preview is None:
            return None
        self._before = preview.latents  # read even if none is due: two points of the way tell the noise
        if progress.steps_done * (self._num_wanted + 1) < request.num_steps * (self._num_made + 1):
            return None
        self._num_made += 1
        size = request.shape.width, request.shape.height
        return np.asarray(Image.fromarray(preview.pixels).resize(size, Image.Resampling.BICUBIC))
