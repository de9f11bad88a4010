"""Finished requests' outputs, from the store to values."""

from __future__ import annotations

import asyncio

from tetriserve.core.errors import RequestFailed
from tetriserve.core.events import Output
from tetriserve.core.request import MP4, RAW_PIXELS
from tetriserve.core.states import StateStore
from tetriserve.engine.progress import Generated, GeneratedImage, GeneratedVideo
from tetriserve.models.video_file import VideoFile
from tetriserve.worker.bundle import arrays_of
from tetriserve.workload.outcome import Outcome


async def read_output(states: StateStore, output: Output, outcome: Outcome) -> Generated:
    """What a request asked for, with its `outcome`. A thread waits for the store, and not the event loop.

    Raises:
        RequestFailed: it cannot be read.
    """
    assert output.media_type in (RAW_PIXELS, MP4), output.media_type
    try:
        return await asyncio.to_thread(_read, states, output, outcome)
    except RuntimeError as error:  # no thread at the moment
        raise _unreadable(output, error) from error


def _read(states: StateStore, output: Output, outcome: Outcome) -> Generated:
    try:
        data = states.get(output.ref)
    except (OSError, MemoryError) as error:
        raise _unreadable(output, error) from error
    try:
        arrays = arrays_of(data)
        if output.media_type == MP4:
            files = VideoFile(arrays["video"].tobytes(), arrays["thumbnail"].tobytes())
            return GeneratedVideo(files, outcome)
        return GeneratedImage(arrays["pixels"], outcome)
    except Exception as error:  # safetensors has errors of its own
        raise _unreadable(output, error) from error


def _unreadable(output: Output, error: Exception) -> RequestFailed:
    what = "video" if output.media_type == MP4 else "image"
    return RequestFailed(f"the finished {what} cannot be read ({type(error).__name__})")
