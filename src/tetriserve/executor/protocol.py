"""What the engine needs of whatever runs its tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from tetriserve.core.events import Event, StartTask, TensorRef
from tetriserve.core.memory import RankMemory
from tetriserve.core.states import StateStore

OnEvent = Callable[[Event], None]
"""Called on the event loop with TaskFinished, TaskFailed, WorkerLost, WorkerJoined and StateLost."""


class Executor(Protocol):
    """A pool of ranks. All methods are called on one event loop, and none but `start` and `stop` blocks."""

    @property
    def ranks(self) -> frozenset[int]:
        """Ranks that are up and warm."""
        ...

    @property
    def states(self) -> StateStore:
        """Where tasks leave what they did, and find what they go on with."""
        ...

    @property
    def preview_bases(self) -> Mapping[str, TensorRef]:
        """Names matrices of `models.preview` among the states, by the keys of their models, once workers left them."""
        ...

    @property
    def memory(self) -> Mapping[int, RankMemory]:
        """What each rank that is up holds of the model."""
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

    def forget(self, request_id: str) -> None:
        """Drop all state of a request that no task runs for."""
        ...

    async def stop(self) -> None: ...
