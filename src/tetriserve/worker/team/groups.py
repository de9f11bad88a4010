"""Exchange through torch's process groups (gloo, NCCL), formed when a team is first entered and kept for the next time.

The one file that uses torch's private group construction (pinned torch, tested in tests/gloo). `dist.new_group` will
not do: its names hash a count local to each process, and it hangs when members have formed different numbers of
groups. Here the world is a `fake` default group, large and never used for communication, so that a replacement takes
a dead rank's id and no other rank initialises again.

Whether the group of these ranks is there is for all members to know alike, or some would wait for others: it is there
when they were in a task together, and no word that they share says that it ended badly, or that one has dropped it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from tetriserve.models.team import PeerLost
from tetriserve.worker.team.region import Region
from tetriserve.worker.team.shm import ShmTeam

MAX_RANKS = 4096
_CONNECTING_TIMEOUT = timedelta(seconds=1.5)
"""Members connect when all have come, in about 10 ms; a death in the midst of it holds up the others for this long."""
_GLOO_PATIENCE = 5
"""Gloo waits for a connection so many times as long as the timeout that it is given."""
_LOOK_S = 0.01
_COLLECTIVE_MARKS = ("gloo", "nccl", "connection", "peer", "timed out")


@dataclass
class _Group:
    """`formed`, `token`: of the first and the last task that it was entered for."""

    process_group: dist.ProcessGroup
    formed: int
    token: int


class GroupTeam(ShmTeam):
    """A team whose members meet in shared memory, and exchange by torch.

    Args:
        backend: `gloo` or `nccl`.
        directory: where members leave their addresses, shared by all ranks of the machine.
        timeout_s: a collective that waits longer for a peer fails.
        max_groups: live groups of this rank at most, the least recently used goes first: they cost threads and files.
    """

    def __init__(
        self, region: Region, rank: int, backend: str, directory: Path, timeout_s: float, max_groups: int
    ) -> None:
        super().__init__(region, rank)
        self._backend = backend
        self._directory = directory
        self._timeout = timedelta(seconds=timeout_s)
        self._max_groups = max_groups
        self._groups: OrderedDict[tuple[int, ...], _Group] = OrderedDict()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=MAX_RANKS)
        threading.Thread(target=self._watch, name="team-watch", daemon=True).start()

    def enter(self, ranks: Sequence[int], token: int) -> None:
        """Raises PeerLost: a member did not come, or did not connect."""
        super().enter(ranks, token)
        for stale in [other for other, group in self._groups.items() if not self._is_whole(other, group)]:
            self._drop(stale)
        if self._ranks not in self._groups:
            self._groups[self._ranks] = self._form()
            if len(self._groups) > self._max_groups:
                self._evict()
        self._groups[self._ranks].token = token
        self._groups.move_to_end(self._ranks)

    def abort(self) -> None:
        super().abort()
        self._drop(self._ranks)

    def exchange(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], largest_bytes: int) -> None:
        """See `Team.exchange`. Raises PeerLost."""
        num_sent, num_received = ([tensor.numel() for tensor in tensors] for tensors in (sends, receives))
        outgoing = torch.cat([tensor.reshape(-1) for tensor in sends])
        incoming = outgoing.new_empty(sum(num_received))
        try:
            group = self._groups[self._ranks].process_group
            dist.all_to_all_single(incoming, outgoing, num_received, num_sent, group=group)
        except Exception as error:
            if self._is_over() or _is_collective_error(error):
                raise PeerLost(f"{type(error).__name__}: {error}") from error
            raise
        for target, part in zip(receives, torch.split(incoming, num_received), strict=True):
            target.copy_(part.view(target.shape))

    def _is_whole(self, ranks: tuple[int, ...], group: _Group) -> bool:
        """Whether every member still has it: none left its last task, died or dropped it since."""
        words, region = self._words, self._region
        return all(max(words[region.aborted(rank)], words[region.dropped(rank)]) < group.token for rank in ranks)

    def _evict(self) -> None:
        """Drop the group used least recently; the word says so of it, and of all that were used before it."""
        ranks, group = next(iter(self._groups.items()))
        self._words[self._region.dropped(self._rank)] = group.token
        self._drop(ranks)

    def _drop(self, ranks: tuple[int, ...]) -> None:
        """Leave the group; members still inside a collective of it get an error at once.

        Gloo closes its connections only when the last reference to the group is gone. Torch removes the file of
        addresses when the last member leaves, and a member that was killed never does: so the first to leave removes
        it. Only members that are still connecting read it, and they would wait in vain.
        """
        group = self._groups.pop(ranks, None)
        if group is not None:
            self._addresses(group.formed).unlink(missing_ok=True)
            with contextlib.suppress(RuntimeError):
                c10d._abort_process_group(group.process_group)

    def _watch(self) -> None:
        """End the collective in which the task's thread waits once the task is aborted: NCCL would wait for ever."""
        never = threading.Event()
        while not never.wait(_LOOK_S):
            if self._ranks in self._groups and self._is_over():
                self._drop(self._ranks)

    def _form(self) -> _Group:
        """With all members, who do the same."""
        self.meet()
        ranks, addresses = self._ranks, self._addresses(self._token)
        # Gloo connects now, NCCL with its first collective.
        is_gloo = self._backend == "gloo"
        connecting = min(self._timeout, _CONNECTING_TIMEOUT) if is_gloo else self._timeout
        try:
            store = dist.FileStore(str(addresses), self.degree)  # type: ignore[attr-defined]
            store.set_timeout(connecting)
            process_group, _ = c10d._new_process_group_helper(
                self.degree,
                self.index,
                list(ranks),
                dist.Backend(self._backend),
                store,
                c10d.GroupName(addresses.name),
                timeout=connecting / _GLOO_PATIENCE if is_gloo else connecting,
            )
        except RuntimeError as error:  # gloo's, whose texts say nothing of peers
            addresses.unlink(missing_ok=True)
            raise PeerLost(f"a peer did not connect: {error}") from error
        c10d._set_pg_timeout(self._timeout, process_group)
        c10d._world.pg_group_ranks[process_group] = {rank: index for index, rank in enumerate(ranks)}
        return _Group(process_group, self._token, self._token)

    def _addresses(self, token: int) -> Path:
        """The file in which members of the group that is formed for this task leave theirs."""
        return self._directory / f"team-{token}"


def _is_collective_error(error: Exception) -> bool:
    """Whether it says that a peer went away, rather than that the computation failed: only its text tells."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(mark in text for mark in _COLLECTIVE_MARKS)
    )
