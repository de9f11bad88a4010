"""A pipe that ends the moment its holder is killed.

The kernel closes the files of a dying process last, after it has taken its memory apart: with torch loaded tens of
milliseconds, on busy cores 100 and more. But a thread that shares its files with nobody takes them along as it dies,
and threads die first.
"""

from __future__ import annotations

import ctypes
import threading
from multiprocessing.connection import Connection

_CLOSE_RANGE_UNSHARE = 2
_LAST_FILE = 2**32 - 1


def hold(lifeline: Connection) -> None:
    """Keep our end open for as long as this process lives. Call before other threads and files are there."""
    is_held = threading.Event()
    has_own_files = threading.Event()

    def sleep() -> None:
        if _keep_only(lifeline.fileno()):
            has_own_files.set()
        is_held.set()
        threading.Event().wait()

    threading.Thread(target=sleep, name="lifeline", daemon=True).start()
    is_held.wait()
    if has_own_files.is_set():
        lifeline.close()  # the thread's is the last; otherwise ours ends with the process, somewhat later


def _keep_only(descriptor: int) -> bool:
    """Give the calling thread files of its own, and of them only this one. False where the system cannot."""
    try:
        close_range = ctypes.CDLL(None).close_range  # Linux 5.9, glibc 2.34
    except (OSError, AttributeError):
        return False
    close_range.argtypes = (ctypes.c_uint, ctypes.c_uint, ctypes.c_int)
    if close_range(0, descriptor - 1, _CLOSE_RANGE_UNSHARE) != 0:
        return False
    close_range(descriptor + 1, _LAST_FILE, 0)
    return True
