"""A pipe that ends the moment its holder is killed.

The kernel closes the files of a dying process last, after it has taken its memory apart: with torch loaded tens of
milliseconds, on busy cores 100 and more. But a thread that shares its files with nobody takes them along as it dies,
and threads die first.
"""

from __future__ import annotations

import ctypes
import os
import threading
from multiprocessing.connection import Connection

_CLONE_FILES = 0x400
_MAX_FILES = 2**20


def hold(lifeline: Connection) -> None:
    """Keep our end open for as long as this process lives. Call before other threads and files are there."""
    is_held = threading.Event()
    has_own_files = threading.Event()

    def sleep() -> None:
        if _unshare_files() == 0:
            descriptor = lifeline.fileno()
            os.closerange(0, descriptor)
            os.closerange(descriptor + 1, _MAX_FILES)
            has_own_files.set()
        is_held.set()
        threading.Event().wait()

    threading.Thread(target=sleep, name="lifeline", daemon=True).start()
    is_held.wait()
    if has_own_files.is_set():
        lifeline.close()  # the thread's is the last; otherwise ours ends with the process, somewhat later


def _unshare_files() -> int:
    """0 if the calling thread now has a copy of the process's files of its own."""
    try:
        result: int = ctypes.CDLL(None).unshare(_CLONE_FILES)
    except (OSError, AttributeError):  # not Linux
        return -1
    return result
