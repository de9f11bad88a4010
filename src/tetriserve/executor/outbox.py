"""Sending to a process that may not be reading: whatever its pipe has no room for waits here."""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections import deque
from multiprocessing.connection import Connection

from tetriserve.core.messages import ToWorker


class Outbox:
    """Messages to one worker, in order. Never blocks the event loop.

    A worker that loads its model, computes a long step or is stopped reads nothing, and a full pipe (about 280 small
    messages on Linux) would stop the server, the watch over that worker included.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[ToWorker] = deque()

    def send(self, message: ToWorker) -> None:
        self._waiting.append(message)
        if len(self._waiting) == 1:
            self._flush()

    def close(self) -> None:
        """Drop what still waits. Call before the connection is closed."""
        self._waiting.clear()
        asyncio.get_running_loop().remove_writer(self._connection.fileno())

    def _flush(self) -> None:
        loop, fileno = asyncio.get_running_loop(), self._connection.fileno()
        while self._waiting:
            if not _has_room(fileno):
                loop.add_writer(fileno, self._flush)
                return
            message = self._waiting.popleft()
            with contextlib.suppress(OSError):  # it just died; its pipe will say so
                self._connection.send(message)
        loop.remove_writer(fileno)


def _has_room(fileno: int) -> bool:
    """Whether a message fits: the kernel calls a socket writable while three quarters of its buffer are free."""
    poll = select.poll()
    poll.register(fileno, select.POLLOUT)
    return bool(poll.poll(0))
