"""A function that pauses: it runs in a thread of its own, and goes on when its owner says so."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

_END_S = 10.0
"""To wait for a thread that was told to end. It does nothing but leave its function, unless a step of it runs."""


class Released(BaseException):
    """Ends a function that is wanted no more, from within `pause`. No `Exception`, which the function may handle."""


@dataclass(frozen=True)
class _Report:
    """From the thread. cpu_s: of the processor, since it last went on."""

    has_ended: bool
    cpu_s: float
    result: Any = None
    error: BaseException | None = None


@dataclass
class _Turns:
    """Shared by the thread and its owner; the thread knows nothing else of the owner, whose end ends the thread."""

    goes_on: queue.SimpleQueue[bool] = field(default_factory=queue.SimpleQueue)
    reports: queue.SimpleQueue[_Report] = field(default_factory=queue.SimpleQueue)
    is_released: bool = False

    def wait(self) -> None:
        """Raises Released."""
        if self.is_released or not self.goes_on.get():
            self.is_released = True  # a function that handles it gets it again
            raise Released


class PausingThread:
    """Runs `body(pause)`, which pauses wherever it calls `pause()`. It has not begun before the first `go_on`.

    The thread ends with `release`, or with this object: then `pause` raises Released. Gradients are off in it, it has
    as many threads for operations as the owner's, and the owner's CUDA device.

    cpu_s: processor time of the thread so far.
    """

    def __init__(self, body: Callable[[Callable[[], None]], Any], device: torch.device, name: str) -> None:
        turns = self._turns = _Turns()
        self.cpu_s = 0.0
        self.has_ended = False
        self.result: Any = None
        arguments = (body, turns, device, torch.get_num_threads())
        self._thread = threading.Thread(target=_run, args=arguments, name=name, daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, _release, turns, self._thread)
        self._end.atexit = False  # the process ends without it: the thread is a daemon

    def go_on(self) -> None:
        """Until the next pause, or the end: then `has_ended`, and `result` is what the function returned.

        Raises:
            BaseException: what the function raised; it has ended.
        """
        assert not self.has_ended and self._end.alive
        self._turns.goes_on.put(True)
        report = self._turns.reports.get()
        self.cpu_s += report.cpu_s
        self.has_ended, self.result, error = report.has_ended, report.result, report.error
        del report
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback has this frame: together they would keep the function's tensors

    def release(self) -> None:
        """End the function where it pauses. Waits for its thread, for `_END_S` at most."""
        self.has_ended = True
        self._end()


def _run(body: Callable[[Callable[[], None]], Any], turns: _Turns, device: torch.device, num_threads: int) -> None:
    began_s = 0.0

    def pause() -> None:
        nonlocal began_s
        turns.reports.put(_Report(False, time.thread_time() - began_s))
        turns.wait()
        began_s = time.thread_time()

    try:
        turns.wait()
        began_s = time.thread_time()
        torch.set_num_threads(num_threads)  # each thread has a number of its own
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with torch.no_grad():
            result = body(pause)
        del body
        turns.reports.put(_Report(True, time.thread_time() - began_s, result))
    except Released:
        pass
    except BaseException as error:  # the thread's boundary: it is raised again where the owner waits
        turns.reports.put(_Report(True, time.thread_time() - began_s, error=error))


def _release(turns: _Turns, thread: threading.Thread) -> None:
    turns.goes_on.put(False)
    if thread is not threading.current_thread():  # which the garbage collector may run in
        thread.join(_END_S)
