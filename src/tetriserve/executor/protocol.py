"""What the engine needs of whatever runs its tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tetriserve.core.events import Event, StartTask, TensorRef
from tetriserve.core.request import Request

if TYPE_CHECKING:
    import numpy as np

    from tetriserve.models.preview import Latents


@dataclass(frozen=True)
class Preview:
    """pixels: uint8, small, of the image's proportions. latents: what they were made from."""

    pixels: np.ndarray
    latents: Latents


OnEvent = Callable[[Event], None]
"""Called on the event loop with TaskFinished, TaskFailed, WorkerLost and WorkerJoined."""


class Executor(Protocol):
    """A pool of ranks. All methods are called on one event loop, and none but `start` and `stop` blocks."""

    @property
    def ranks(self) -> frozenset[int]:
        """Ranks that are up and warm."""
        ...

    def subscribe(self, on_event: OnEvent) -> None:
        """Send events here from now on; replaces the previous subscriber."""
        ...

    async def start(self, on_progress: Callable[[str], None]) -> None:
        """Bring all ranks up, warm. `on_progress` hears what is going on, for the terminal.

        Raises:
            ConfigError: the workers cannot serve what they were told to.
        """
        ...

    def start_task(self, command: StartTask) -> None:
        """Run a task on idle ranks. Its end is one TaskFinished or TaskFailed, after which all of them are idle."""
        ...

    def read_pixels(self, ref: TensorRef) -> np.ndarray:
        """Decoded pixels, uint8, (height, width, 3).

        Raises:
            RequestFailed: they cannot be read.
        """
        ...

    def read_preview(self, request: Request, latents: TensorRef, before: Latents | None) -> Preview | None:
        """What the latents that a denoise task left behind will look like; None if that cannot be said.

        Any thread may call it: it takes a millisecond or two, and no rank's time. `before` is what an earlier call for
        the same request returned the latents of.
        """
        ...

    def read_state(self, ref: TensorRef) -> bytes | None:
        """What a task left, to be kept elsewhere; None if it is gone. Any thread may call it."""
        ...

    def put_state(self, key: str, state: bytes) -> TensorRef:
        """Take back, under its old key, what `read_state` gave: tasks can start from it. Any thread may call it."""
        ...

    def forget(self, request_id: str) -> None:
        """Drop all state of a request that no task runs for."""
        ...

    async def stop(self) -> None: ...
