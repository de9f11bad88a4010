"""Process groups over any set of ranks, formed when first needed, by the name that the executor gave them.

The one file that uses torch's private group construction (pinned torch, tested in tests/gloo). `dist.new_group` will
not do: its names hash a count local to each process, and it hangs when members have formed different numbers of
groups. Here the world is a `fake` default group, large and never used for communication, so that a replacement takes
a dead rank's id and nobody re-initialises; the real groups rendezvous in a directory of their own in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from tetriserve.worker.rendezvous import PeerAbsent, Rendezvous

MAX_RANKS = 4096
_MEETING_TIMEOUT_S = 10.0
"""Members are told to form a group at the same moment; one that does not come is stopped, and soon replaced."""
_CONNECTING_TIMEOUT = timedelta(seconds=1.5)
"""They connect when all have come, in about 10 ms; a death in the midst of it holds up the others for this long."""
_GLOO_PATIENCE = 5
"""Gloo waits for a connection so many times as long as the timeout that it is given."""
_COLLECTIVE_MARKS = ("gloo", "nccl", "connection", "peer", "timed out")


class _MeetingStore(c10d.Store):
    """A group's rendezvous as its backend sees it. Unlike torch's stores it can be left, when a peer dies meanwhile."""

    def __init__(self, rendezvous: Rendezvous, timeout: timedelta) -> None:
        super().__init__()
        self._rendezvous = rendezvous
        self._timeout = timeout

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # backends write bytes
        self._rendezvous.put(key, value)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._rendezvous.get(key)

    def check(self, keys: list[str]) -> bool:
        return self._rendezvous.has(keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """For as long as the store says, whatever the backend does: see `_GLOO_PATIENCE`."""
        self._rendezvous.wait(keys, self._timeout.total_seconds())


@dataclass(frozen=True)
class Group:
    """`store` is what the backend met in: its native half calls the Python one for as long as the group is there."""

    process_group: dist.ProcessGroup
    mesh: DeviceMesh
    store: c10d.Store


class Groups:
    """The groups that this rank belongs to, by name.

    Forming one is collective: every member must ask for the same name. Who forgets which and when is the executor's
    to say, for all members alike; deciding it here would leave some members waiting for others.
    """

    def __init__(self, rank: int, backend: str, device: str, directory: Path, timeout_s: float) -> None:
        self._rank = rank
        self._backend = backend
        self._device = torch.device(device)
        self._directory = directory
        self._timeout = timedelta(seconds=timeout_s)
        self._groups: dict[str, Group] = {}
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=MAX_RANKS)

    def get(self, name: str, ranks: Sequence[int]) -> Group:
        """The group `name` of `ranks`, formed now if this is the first time (about 10 ms, all members at once).

        Raises:
            PeerAbsent: a member did not come, or the executor has dropped the group meanwhile.
        """
        if name not in self._groups:
            self._groups[name] = self._form(name, list(ranks))
        return self._groups[name]

    def warm(self, name: str, ranks: Sequence[int]) -> None:
        """Form the group and run one collective, which allocates its channels and buffers."""
        group = self.get(name, ranks)
        ones = torch.ones(len(ranks), device=self._device)
        dist.all_to_all_single(torch.empty_like(ones), ones, group=group.process_group)

    def drop(self, name: str) -> None:
        """Leave the group; members still inside a collective of it get an error at once.

        Gloo closes its connections only when the last reference to the group is gone: whoever was given its mesh must
        have let go of it before.
        """
        group = self._groups.pop(name, None)
        if group is not None:
            with contextlib.suppress(RuntimeError):
                c10d._abort_process_group(group.process_group)

    def _form(self, name: str, ranks: list[int]) -> Group:
        rendezvous = Rendezvous(self._directory / name)
        rendezvous.meet(self._rank, ranks, _MEETING_TIMEOUT_S)
        # Gloo connects now, NCCL with its first collective.
        is_gloo = self._backend == "gloo"
        connecting = min(self._timeout, _CONNECTING_TIMEOUT) if is_gloo else self._timeout
        store = _MeetingStore(rendezvous, connecting)
        try:
            process_group, _ = c10d._new_process_group_helper(
                len(ranks),
                ranks.index(self._rank),
                ranks,
                dist.Backend(self._backend),
                store,
                c10d.GroupName(name),
                timeout=connecting / _GLOO_PATIENCE if is_gloo else connecting,
            )
        except PeerAbsent:
            raise
        except RuntimeError as error:  # gloo's, whose texts say nothing of peers
            raise PeerAbsent(f"a peer did not connect: {error}") from error
        c10d._set_pg_timeout(self._timeout, process_group)
        c10d._world.pg_group_ranks[process_group] = {rank: index for index, rank in enumerate(ranks)}
        return Group(process_group, DeviceMesh.from_group(process_group, self._device.type), store)


def is_collective_error(error: BaseException) -> bool:
    """Whether `error` says that a peer went away, rather than that the computation failed.

    Backends raise plain RuntimeErrors that only their text tells apart.
    """
    if isinstance(error, dist.DistError | PeerAbsent):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(mark in text for mark in _COLLECTIVE_MARKS)
