"""Where the members of a group meet before they connect: a directory of the group's own.

The executor opens it, and closes it when the group is not to be: then whoever waits there leaves at once. The backends'
own rendezvous cannot be left; one that a dead member never comes to lasts for its whole timeout.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

_LOOK_S = 0.001


class PeerAbsent(RuntimeError):
    """A peer did not come, or will not: the group was dropped."""


def open_rendezvous(directory: Path) -> None:
    directory.mkdir(exist_ok=True)


def close_rendezvous(directory: Path) -> None:
    """Gone at once for those who look for it, whatever they write into it meanwhile."""
    closed = directory.with_name(f".{directory.name}")
    with contextlib.suppress(FileNotFoundError):
        directory.rename(closed)
    shutil.rmtree(closed, ignore_errors=True)


def meet(directory: Path, rank: int, ranks: Sequence[int], timeout_s: float) -> None:
    """Wait until every one of `ranks` is here.

    Raises:
        PeerAbsent: the rendezvous is closed, or a peer did not come in time.
    """
    give_up_at = time.monotonic() + timeout_s
    try:
        (directory / f"rank-{rank}").touch()
    except FileNotFoundError:
        raise PeerAbsent("a peer is gone: the group was dropped") from None
    for other in ranks:
        while not (directory / f"rank-{other}").exists():
            if not directory.exists():
                raise PeerAbsent("a peer is gone: the group was dropped")
            if time.monotonic() > give_up_at:
                raise PeerAbsent(f"peer {other} did not come within {timeout_s:g} s")
            time.sleep(_LOOK_S)  # on the task's thread, which has nothing to do before all are here
