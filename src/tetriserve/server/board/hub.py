"""Who watches the board, and what each of them was not sent yet."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress

from tetriserve.core.errors import ShuttingDown
from tetriserve.engine import LiveEngine, Observation, Stopped
from tetriserve.server.board.feed import BoardFeed
from tetriserve.server.board.rows import Row, plan_row
from tetriserve.server.recent import RecentRuns
from tetriserve.server.slot import EngineSlot

logger = logging.getLogger(__name__)

FLUSH_S = 0.05
"""Changes closer together than this are told together."""
PLAN_S = 0.25
"""The plan is looked at no more often than this."""
KEEP_ALIVE_S = 15.0
"""After so much silence a comment is sent: proxies close what is silent for longer."""
MAX_PENDING = 64
"""Messages that wait for one slow page; with one more all are dropped, and it starts anew from a snapshot."""

_REST = 4.0
"""Planning rests for so many times as long as it took: of long queues it must not take the processor."""
_KEEP_ALIVE = b": nothing new\n\n"


class Watcher:
    """One open page. `is_behind` while it needs a snapshot: at first, and whenever it was too slow."""

    def __init__(self) -> None:
        self.is_behind = True
        self.pending: deque[bytes] = deque()
        self.has_news = asyncio.Event()

    def tell(self, message: bytes) -> None:
        """Have `message` sent, unless a snapshot will say the same."""
        if self.is_behind:
            return
        if len(self.pending) == MAX_PENDING:
            self.pending.clear()
            self.is_behind = True
        else:
            self.pending.append(message)
        self.has_news.set()

    async def wait(self) -> bool:
        """Whether there is something to send within `KEEP_ALIVE_S`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.has_news.wait(), KEEP_ALIVE_S)
        has_news = self.has_news.is_set()
        self.has_news.clear()
        return has_news


class BoardHub:
    """Tells every watcher what happens in the slot's engine, as server-sent events. Unwatched, it does nothing."""

    def __init__(self, slot: EngineSlot, recent: RecentRuns) -> None:
        self._slot = slot
        self._has_changes = asyncio.Event()
        self._is_plan_old = asyncio.Event()
        self._changed_at = 0.0
        self._feed = BoardFeed(slot, recent, self._note_change)
        self._watchers: set[Watcher] = set()
        self._working: list[asyncio.Task[None]] = []
        self._is_closed = False
        slot.when_filled(self._attach)

    def watch(self) -> AsyncGenerator[bytes, None]:
        """Messages for one page, until the engine stops: a `snapshot`, then `changes`; another snapshot if it lags.

        The page is watched from the first message on, until the generator is closed.

        Raises:
            NotReady: the engine is not there yet.
            ShuttingDown: it is gone.
        """
        self._slot.require()
        if self._is_closed:
            raise ShuttingDown("the server is shutting down")
        return self._messages()

    async def _messages(self) -> AsyncGenerator[bytes, None]:
        watcher = Watcher()
        self._join(watcher)
        try:
            while not self._is_closed:
                if watcher.is_behind:
                    yield await self._snapshot(watcher)
                while watcher.pending:
                    yield watcher.pending.popleft()
                if not watcher.is_behind and not await watcher.wait():
                    yield _KEEP_ALIVE
        finally:
            self._leave(watcher)

    async def _snapshot(self, watcher: Watcher) -> bytes:
        """Everything up to now; from now on the watcher is told what follows."""
        self._flush()  # so that nothing is told twice
        make = self._feed.snapshot()
        watcher.is_behind = False
        return await asyncio.to_thread(lambda: encode("snapshot", make()))

    def _join(self, watcher: Watcher) -> None:
        self._watchers.add(watcher)
        if not self._working:
            self._feed.is_watched = True
            self._is_plan_old.set()
            self._working = [
                asyncio.create_task(self._flush_regularly()),
                asyncio.create_task(self._look_ahead_regularly(self._slot.require())),
            ]

    def _leave(self, watcher: Watcher) -> None:
        self._watchers.discard(watcher)
        if not self._watchers:
            for task in self._working:
                task.cancel()
            self._working = []
            self._feed.rest()

    async def _flush_regularly(self) -> None:
        while True:
            await self._has_changes.wait()
            self._flush()
            await asyncio.sleep(FLUSH_S)

    async def _look_ahead_regularly(self, engine: LiveEngine) -> None:
        loop, forecast = asyncio.get_running_loop(), None
        while True:
            await self._is_plan_old.wait()
            self._is_plan_old.clear()
            start_s, before = loop.time(), forecast
            try:
                forecast = await engine.forecast()
            except Exception:  # of a policy, which may be a third party's: what serves is another instance
                logger.exception("the board goes on without a plan")
                return
            if forecast is not before:
                self._feed.change_plan(plan_row(forecast))
                self._has_changes.set()
            if forecast.now < self._changed_at:  # the engine shares one for a while
                self._is_plan_old.set()
            await asyncio.sleep(max(PLAN_S, _REST * (loop.time() - start_s)))

    def _note_change(self) -> None:
        self._has_changes.set()
        self._is_plan_old.set()
        self._changed_at = self._slot.require().now

    def _flush(self) -> None:
        if not self._has_changes.is_set():
            return
        self._has_changes.clear()
        message = encode("changes", self._feed.take_changes())
        for watcher in self._watchers:
            watcher.tell(message)

    def _attach(self, engine: LiveEngine) -> None:
        engine.subscribe(self._observe)

    def _observe(self, observation: Observation) -> None:
        if not isinstance(observation, Stopped):
            return
        self._is_closed = True
        for watcher in self._watchers:
            watcher.has_news.set()


def encode(name: str, data: Row) -> bytes:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()
