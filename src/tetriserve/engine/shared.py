"""Images that several callers wait for, and that are made whether or not anybody does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from tetriserve.engine.progress import GeneratedImage, Progress, Watcher


class SharedWork:
    """One piece of work. `run` begins it; callers come and go."""

    def __init__(self) -> None:
        self._task: asyncio.Task[list[GeneratedImage]] | None = None
        self._watchers: list[Watcher] = []
        self._latest: dict[int, Progress | GeneratedImage] = {}

    def run(self, making: Coroutine[Any, Any, list[GeneratedImage]], on_end: Callable[[], None]) -> None:
        """Begin; `on_end` is called when it ends, one way or another."""
        self._task = asyncio.create_task(making)
        self._task.add_done_callback(_retrieve)
        self._task.add_done_callback(lambda task: on_end())

    async def images(self, watch: Watcher | None = None) -> list[GeneratedImage]:
        """The images once they are there; `watch` hears where each stands, and then of every change.

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

    def tell(self, number: int, update: Progress | GeneratedImage) -> None:
        self._latest[number] = update
        for watch in self._watchers:
            watch(number, update)

    async def wait(self) -> None:
        """Until it has ended, one way or another."""
        if self._task is not None:
            await asyncio.wait({self._task})


def _retrieve(task: asyncio.Task[list[GeneratedImage]]) -> None:
    """All callers may have left before it failed: asyncio would complain that nobody heard of it."""
    if not task.cancelled():
        task.exception()
