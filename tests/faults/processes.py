"""The processes of one server, as the system shows them from outside."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_RANK = re.compile(r"ts-rank-(\d+)")
_PF_EXITING = 0x4
"""The kernel's flag of a process that it is taking apart: that takes a while, in which the server knows already."""


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    name: str
    started: int
    """In clock ticks since the machine started."""

    @property
    def rank(self) -> int | None:
        match = _RANK.fullmatch(self.name)
        return int(match[1]) if match else None


def find_processes(session: int) -> Iterator[Process]:
    """Living processes of a session: also those whose parent has died, which are nobody's descendants any more."""
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                head, _, tail = (directory / "stat").read_text().rpartition(")")
            except OSError:
                continue  # it has just ended
            values = tail.split()
            is_dying = values[0] in "ZX" or int(values[6]) & _PF_EXITING
            if int(values[3]) == session and not is_dying:
                yield Process(int(directory.name), head.partition("(")[2], int(values[19]))


def find_workers(session: int) -> dict[int, int]:
    """Process id of each rank's latest worker."""
    processes = sorted(find_processes(session), key=lambda process: process.started)
    return {process.rank: process.pid for process in processes if process.rank is not None}


def find_fork_server(session: int) -> int | None:
    """The process that workers are forked from, if it lives."""
    for process in find_processes(session):
        if process.rank is None and b"multiprocessing.forkserver" in _read(f"/proc/{process.pid}/cmdline"):
            return process.pid
    return None


def store_directory(pid: int) -> Path | None:
    """The tensor store of the server `pid`: it holds a lock in it."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = Path(os.readlink(descriptor))
        except OSError:
            continue
        if target.name == "lock" and "tetriserve-store-" in target.parent.name:
            return target.parent
    return None


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
