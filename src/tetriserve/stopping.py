"""What SIGTERM and Ctrl-C do to a command: it cleans up and ends, in bounded time and with a documented exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tetriserve.core.errors import TetriServeError

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_T = TypeVar("_T")


class Interrupted(TetriServeError):
    """A signal ended the command before it was done.

    Attributes:
        exit_code: 128 plus the signal's number, as shells count.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextmanager
def caught_signals(on_signal: Callable[[int], None]) -> Iterator[None]:
    """The running loop calls `on_signal` for each signal to stop, while the context lasts. On the main thread only."""
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)


def run_until_signal(work: Coroutine[Any, Any, _T]) -> _T:
    """`asyncio.run`; the first signal to stop cancels `work`, which has the time that it needs to clean up.

    Raises:
        Interrupted: a signal came first.
    """
    return asyncio.run(_until_signal(work))


async def _until_signal(work: Coroutine[Any, Any, _T]) -> _T:
    task = asyncio.ensure_future(work)
    received: list[int] = []

    def break_off(number: int) -> None:
        if not received:
            task.cancel()
        received.append(number)

    with caught_signals(break_off):
        await asyncio.wait({task})
    if received and (task.cancelled() or task.exception() is not None):
        raise Interrupted(received[0])
    return task.result()


class HardStop:
    """Ends this process some time after `arm`, if its context still lasts: a thread that hangs must not keep it.

    exit_code: with which; set it as soon as it is known.
    """

    def __init__(self, timeout_s: float) -> None:
        self.exit_code = 1
        self._timer = threading.Timer(timeout_s, self._end)
        self._timer.daemon = True
        self._timeout_s = timeout_s

    def arm(self) -> None:
        self._timer.start()

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        own = (threading.current_thread(), threading.main_thread())
        stuck = [thread.name for thread in threading.enumerate() if thread not in own and not thread.daemon]
        logger.critical("still not stopped after %g s; threads at work: %s", self._timeout_s, stuck)
        os._exit(self.exit_code)
