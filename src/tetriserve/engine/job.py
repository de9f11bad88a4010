"""One job: work that several callers wait for, and what its key stands for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from tetriserve.core.errors import TetriServeError
from tetriserve.engine.progress import Generated, GeneratedImage, Progress, Watcher

Tell = Callable[[int, Progress | Generated], None]


class Job:
    """Images or a video that several callers wait for, and that are made whether or not anybody does.

    `run` begins it; callers come and go. `hear` hears of all that they could hear of.
    """

    def __init__(self, hear: Tell | None = None) -> None:
        self._task: asyncio.Task[list[Generated]] | None = None
        self._watchers: list[Watcher] = [] if hear is None else [hear]
        self._latest: dict[int, Progress | Generated] = {}
        self._is_admitted = asyncio.Event()

    def run(self, making: Coroutine[Any, Any, list[Generated]], on_end: Callable[[], None]) -> None:
        """Begin; `on_end` is called when it ends, one way or another."""
        self._task = asyncio.create_task(making)
        self._task.add_done_callback(_retrieve)
        self._task.add_done_callback(lambda task: on_end())

    async def images(self, watch: Watcher | None = None) -> list[GeneratedImage]:
        """The images once they are there; see `outputs`."""
        return [made for made in await self.outputs(watch) if isinstance(made, GeneratedImage)]

    async def outputs(self, watch: Watcher | None = None) -> list[Generated]:
        """What is made once it is there; `watch` hears where each stands, and then of every change.

        Cancelling the call cancels nothing but the call.

        Raises: what the work raised.
        """
        assert self._task is not None, "it was begun"
        if watch is not None:
            for number, update in self._latest.items():
                watch(number, update)
            self._watchers.append(watch)
        try:
            return await asyncio.shield(self._task)
        finally:
            if watch is not None:
                self._watchers.remove(watch)

    async def admitted(self) -> None:
        """Until its requests are admitted.

        Raises: why they are not.
        """
        assert self._task is not None, "it was begun"
        waiting = asyncio.create_task(self._is_admitted.wait())
        try:
            await asyncio.wait({waiting, self._task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if not self.is_admitted:
            await self.outputs()

    @property
    def is_admitted(self) -> bool:
        """Whether its requests were admitted, or what there is of it was read."""
        return self._is_admitted.is_set()

    @property
    def error(self) -> BaseException | None:
        """What the work raised, if it has ended so."""
        task = self._task
        return None if task is None or not task.done() or task.cancelled() else task.exception()

    def tell(self, number: int, update: Progress | Generated) -> None:
        self._latest[number] = update
        self._is_admitted.set()
        for watch in self._watchers:
            watch(number, update)

    async def cancel(self) -> None:
        """End it, and with it its requests; what runs of them ends with its task."""
        if self._task is not None:
            self._task.cancel()
        await self.wait()

    async def wait(self) -> None:
        """Until it has ended, one way or another."""
        if self._task is not None:
            await asyncio.wait({self._task})


@dataclass
class Known:
    """What a key stands for.

    name: of its entry in a journal; None until it is accepted, and without one.
    ended_at: unix time at which all was there, or it had failed for good.
    failure: why it has failed.
    job: None if it does not run, and what it made is not in memory.
    """

    digest: str
    name: str | None = None
    ended_at: float | None = None
    failure: TetriServeError | None = None
    job: Job | None = None

    def hear(self, number: int, update: Progress | Generated) -> None:
        """Its job tells of one of its outputs."""


def _retrieve(task: asyncio.Task[list[Generated]]) -> None:
    """All callers may have left before it failed: asyncio would complain that nobody heard of it."""
    if not task.cancelled():
        task.exception()
