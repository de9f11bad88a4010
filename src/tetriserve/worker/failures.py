"""Whose fault an error is that ended a task."""

from __future__ import annotations

import errno
import mmap

import torch

from tetriserve.core.events import FailureKind
from tetriserve.core.states import StoreError
from tetriserve.models.team import PeerLost
from tetriserve.worker.store import error_number

_MEMORY_MARKS = ("allocate memory", "out of memory", "bad_alloc", "alloc_failed")
_PROBE_BYTES = 2**24


def failure_kind(error: BaseException) -> FailureKind:
    if isinstance(error, StoreError) or error_number(error) == errno.ENOSPC:
        return FailureKind.STORE
    if is_memory_error(error) or is_starved():
        return FailureKind.MEMORY
    return FailureKind.LOST if isinstance(error, PeerLost) else FailureKind.STEP


def is_memory_error(error: BaseException) -> bool:
    """Whether memory ran out. Most libraries say so by a RuntimeError's text alone."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return any(mark in str(error).lower() for mark in _MEMORY_MARKS) and not isinstance(error, ValueError)


def is_starved() -> bool:
    """Whether this process can get no more memory, whatever an error says: some libraries name another reason."""
    try:
        mmap.mmap(-1, _PROBE_BYTES).close()
    except OSError:
        return True
    return False
