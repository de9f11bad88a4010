"""What happens to a process when the one that started it dies, whatever state either is in (Linux's prctl(2))."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Be killed, also while stopped, when the *thread* that started this process ends. Elsewhere than on Linux: no."""
    _ask_for(signal.SIGKILL)


def follow_server() -> None:
    """A worker's way to end with the server.

    A worker that the server itself started is killed with it. One that was forked from the fork server lives on when
    that one dies alone, so it is only woken: it finds its pipe closed if the server is dead too, also after a stop.
    """
    server = multiprocessing.parent_process()
    _ask_for(signal.SIGKILL if server is not None and server.pid == os.getppid() else signal.SIGCONT)


def _ask_for(number: signal.Signals) -> None:
    with contextlib.suppress(OSError, AttributeError):  # no such function here
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
