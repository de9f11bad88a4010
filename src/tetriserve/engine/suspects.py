"""Is it this request that brings the server down, or was it only there each time?

After `MAX_STARTS` crashes in a row that each hit it at work, without a task finished between them, a request is under
suspicion. The next life holds it back at first. If the server goes down all the same, something else does it, and the
request is as good as new. If the server stands, suspects are tried, one at a time; one that goes down with the server
then is failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from tetriserve.core.errors import ShuttingDown
from tetriserve.journal import Kept

MAX_STARTS = 4
"""Lives of the server, one after the other, in which tasks of a request may begin without one that finishes."""

HOLD_S = 30.0
"""How long the server has to stand before suspects are tried."""


def num_starts(kept: Kept) -> int:
    return max((course.num_starts for course in kept.courses.values()), default=0)


def is_suspect(kept: Kept) -> bool:
    return num_starts(kept) >= MAX_STARTS


def is_guilty(kept: Kept) -> bool:
    """Tried, and the server went down with it."""
    return num_starts(kept) > MAX_STARTS


class Trials:
    """Turns of the suspects of one life of the server."""

    def __init__(self, hold_s: float) -> None:
        self._begin_at = asyncio.get_running_loop().time() + hold_s
        self._turns = asyncio.Lock()
        self._is_over = asyncio.Event()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until it is the caller's; it lasts as long as the context.

        Raises:
            ShuttingDown: it does not come any more.
        """
        async with self._turns:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_over.wait(), self._begin_at - asyncio.get_running_loop().time())
            if self._is_over.is_set():
                raise ShuttingDown("the server shut down before the image was begun")
            yield

    def close(self) -> None:
        """No turn comes any more."""
        self._is_over.set()
