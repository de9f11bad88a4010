"""Requests that nobody sent: what a cost model is asked about."""

from __future__ import annotations

from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages


def probe(shape: Shape, num_steps: int = 1, num_passes: int = 1, model: str = "") -> Request:
    """A request of one size as a client of `model` sends it who says no more."""
    stages = image_stages(num_steps, num_passes)
    return Request(
        request_id="probe", prompt="", shape=shape, stages=stages, seed=0, arrival_s=0.0, deadline_s=0.0, model=model
    )
