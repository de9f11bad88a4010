"""Previews of one image: of its proportions, and small."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tetriserve.core.request import Request
from tetriserve.engine import LiveEngine, Progress

if TYPE_CHECKING:
    from tetriserve.models.preview import Latents


class PreviewMaker:
    """At most `num_wanted` previews, spread evenly over the steps as far as tasks end there; none after the last step.

    max_side: the longer side of previews in pixels at most. None is larger than the image.
    """

    def __init__(self, engine: LiveEngine, request: Request, num_wanted: int, max_side: int) -> None:
        self._engine = engine
        self._request = request
        self._num_wanted = num_wanted
        self._num_made = 0
        shape = request.shape
        scale = min(1.0, max_side / max(shape.width, shape.height))
        self._size = max(1, round(shape.width * scale)), max(1, round(shape.height * scale))
        self._before: Latents | None = None

    def make(self, progress: Progress) -> np.ndarray | None:
        """Pixels, uint8, (height, width, 3), if a preview is due and can be made. Call it off the event loop."""
        request = self._request
        if progress.latents is None or self._num_made == self._num_wanted or progress.steps_done >= request.num_steps:
            return None
        preview = self._engine.previews.read(request, progress.latents, self._before)
        if preview is None:
            return None
        self._before = preview.latents  # read even if none is due: two points of the way tell the noise
        if progress.steps_done * (self._num_wanted + 1) < request.num_steps * (self._num_made + 1):
            return None
        self._num_made += 1
        return np.asarray(Image.fromarray(preview.pixels).resize(self._size, Image.Resampling.BICUBIC))
