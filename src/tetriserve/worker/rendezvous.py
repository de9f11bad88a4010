"""Where the members of a group meet, and learn how to connect: a directory of the group's own.

The executor opens it, and closes it when the group is not to be: then whoever waits there leaves at once. The backends'
own rendezvous cannot be left; one that a dead member never comes to lasts for its whole timeout.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

_LOOK_S = 0.001


class PeerAbsent(RuntimeError):
    """A peer did not come, or will not: the group was dropped."""


class Rendezvous:
    """Named values that members leave for each other in `directory`, each whole or not there at all."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def open(self) -> None:
        self._directory.mkdir(exist_ok=True)

    def close(self) -> None:
        """Gone at once for those who look for it, whatever they write into it meanwhile."""
        closed = self._directory.with_name(f".{self._directory.name}")
        with contextlib.suppress(OSError):
            self._directory.rename(closed)
        shutil.rmtree(closed, ignore_errors=True)

    def meet(self, rank: int, ranks: Sequence[int], timeout_s: float) -> None:
        """Wait until every one of `ranks` is here. Raises PeerAbsent."""
        self.put(f"rank {rank}", b"")
        self.wait([f"rank {other}" for other in ranks], timeout_s)

    def put(self, name: str, value: bytes) -> None:
        """Raises PeerAbsent where the rendezvous is closed."""
        path = self._path(name)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(value)
            temporary.replace(path)
        except FileNotFoundError:
            raise _dropped() from None

    def get(self, name: str) -> bytes:
        """What `wait` has waited for. Raises PeerAbsent where the rendezvous is closed."""
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            raise _dropped() from None

    def has(self, names: Sequence[str]) -> bool:
        return all(self._path(name).exists() for name in names)

    def wait(self, names: Sequence[str], timeout_s: float) -> None:
        """Until all of `names` are there.

        Raises:
            PeerAbsent: the rendezvous is closed, or one of them did not come in time.
        """
        give_up_at = time.monotonic() + timeout_s
        for name in names:
            while not self._path(name).exists():
                if not self._directory.exists():
                    raise _dropped()
                if time.monotonic() > give_up_at:
                    raise PeerAbsent(f"{name} did not come within {timeout_s:g} s")
                time.sleep(_LOOK_S)  # on the task's thread, which has nothing to do before all are here

    def _path(self, name: str) -> Path:
        return self._directory / f"{quote(name, safe='')}.value"


def _dropped() -> PeerAbsent:
    return PeerAbsent("a peer is gone: the group was dropped")
