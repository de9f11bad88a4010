"""Finished requests' outputs, from the store to values."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tetriserve.core.errors import RequestFailed
from tetriserve.core.events import Output
from tetriserve.core.request import RAW_PIXELS
from tetriserve.core.states import StateStore
from tetriserve.worker.bundle import arrays_of

if TYPE_CHECKING:
    import numpy as np


async def read_pixels(states: StateStore, output: Output) -> np.ndarray:
    """Pixels, uint8, (height, width, 3). A thread waits for the store, and not the event loop.

    Raises:
        RequestFailed: they cannot be read.
    """
    assert output.media_type == RAW_PIXELS, output.media_type
    try:
        return await asyncio.to_thread(_read, states, output)
    except RuntimeError as error:  # no thread at the moment
        raise _unreadable(error) from error


def _read(states: StateStore, output: Output) -> np.ndarray:
    try:
        data = states.get(output.ref)
    except (OSError, MemoryError) as error:
        raise _unreadable(error) from error
    try:
        return arrays_of(data)["pixels"]
    except Exception as error:  # safetensors has errors of its own
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> RequestFailed:
    return RequestFailed(f"the finished image cannot be read ({type(error).__name__})")
