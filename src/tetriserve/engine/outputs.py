"""Finished requests' outputs, from the store to values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tetriserve.core.errors import RequestFailed
from tetriserve.core.events import TensorRef
from tetriserve.core.states import StateStore
from tetriserve.worker.bundle import arrays_of

if TYPE_CHECKING:
    import numpy as np


def read_pixels(states: StateStore, ref: TensorRef) -> np.ndarray:
    """Pixels, uint8, (height, width, 3). It waits for the store.

    Raises:
        RequestFailed: they cannot be read.
    """
    try:
        data = states.get(ref)
    except (OSError, MemoryError) as error:
        raise _unreadable(error) from error
    try:
        return arrays_of(data)["pixels"]
    except Exception as error:  # safetensors has errors of its own
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> RequestFailed:
    return RequestFailed(f"the finished image cannot be read ({type(error).__name__})")
