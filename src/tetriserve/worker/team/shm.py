"""Exchange through shared memory: each member writes its part once, counts it, and reads the others' when they have.

There are no groups: to enter a team is to remember who its members are. Each rank has one counter, which only grows,
and two slots, used in turn. A member waits once per exchange, for the others' counters. It may then overwrite the slot
of the exchange before: the others have counted this one, so they have read that one. Between tasks no rank waits: the
executor gives ranks their next task when all members have answered the last.

The order of stores is the processor's on x86; where it is not (ARM), `_fence` keeps it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

import torch

from tetriserve.models.team import PeerLost, shares
from tetriserve.worker.team.region import Region, mark, token_of

_ALIGNMENT = 64
_MAX_VIEWS = 4096
_SPINS_PER_LOOK = 64
_SPIN_S = 0.002
"""Members that have a core each differ by about this long. After it, a waiting member sleeps and frees its core."""
_FIRST_SLEEP_S = 0.00005
_LONGEST_SLEEP_S = 0.001


class ShmTeam:
    """This rank's place in one team after the other; see `models.team.Team`. CUDA tensors go by way of the host."""

    def __init__(self, region: Region, rank: int) -> None:
        self._region = region
        self._rank = rank
        self._words = region.words
        self._bytes = torch.frombuffer(region.memory, dtype=torch.uint8)
        self._known: dict[tuple[int, torch.Size, torch.dtype], torch.Tensor] = {}
        self._lock = threading.Lock()
        self._ranks: tuple[int, ...] = ()
        self._token = self._count = 0
        self.degree, self.index = 1, 0

    def enter(self, ranks: Sequence[int], token: int) -> None:
        """Work with `ranks`, this one among them, from now on. Every member enters with the same arguments.

        Args:
            token: number of the task; higher for each later one that the executor starts.
        """
        self._ranks, self._token, self._count = tuple(ranks), token, 0
        self.degree, self.index = len(ranks), self._ranks.index(self._rank)

    def abort(self) -> None:
        """Free the other members from the task entered last: this rank's part of it has failed."""
        self._region.abort(self._ranks, self._token)

    def check(self) -> None:
        """Raises PeerLost: the task entered last is aborted."""
        if self._is_over():
            raise PeerLost("a peer is gone: the task was aborted")

    def meet(self) -> None:
        """Wait for all members. Raises PeerLost."""
        self._give(())
        for rank in self._ranks:
            self._wait(rank)

    def exchange(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], largest_bytes: int) -> None:
        """See `Team.exchange`. Raises PeerLost."""
        part_bytes = self._region.slot_bytes // self.degree // _ALIGNMENT * _ALIGNMENT
        if largest_bytes <= part_bytes:
            self._exchange_piece(sends, receives, part_bytes)
            return
        num_pieces = 1 + 2 * largest_bytes // part_bytes  # whole tokens, so that some are larger than others
        for piece in range(num_pieces):
            self._exchange_piece(_cut(sends, num_pieces, piece), _cut(receives, num_pieces, piece), part_bytes)

    def _exchange_piece(self, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor], part_bytes: int) -> None:
        self._give(sends, part_bytes)
        receives[self.index].copy_(sends[self.index])
        for index, rank in enumerate(self._ranks):
            if index != self.index:
                self._wait(rank)
                target, slot = receives[index], self._region.slot(rank, self._count % 2)
                target.copy_(self._view(slot + self.index * part_bytes, target.shape, target.dtype))

    def _give(self, sends: Sequence[torch.Tensor], part_bytes: int = 0) -> None:
        """Leave every member its part, and say so."""
        self._count += 1
        slot = self._region.slot(self._rank, self._count % 2)
        for index, tensor in enumerate(sends):
            if index != self.index:
                assert tensor.nbytes <= part_bytes, f"{tensor.nbytes} bytes for a part of {part_bytes}"
                self._view(slot + index * part_bytes, tensor.shape, tensor.dtype).copy_(tensor)
        self._fence()
        self._words[self._region.progress(self._rank)] = mark(self._token, self._count)

    def _view(self, start: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """One view of the shared memory; those of a step are the same at the next."""
        key = (start, shape, dtype)
        view = self._known.get(key)
        if view is None:
            if len(self._known) >= _MAX_VIEWS:
                self._known.clear()
            end = start + shape.numel() * dtype.itemsize
            view = self._known[key] = self._bytes[start:end].view(dtype).view(shape)
        return view

    def _wait(self, rank: int) -> None:
        """Until `rank` has given its part of this exchange.

        Raises:
            PeerLost: the task is aborted.
        """
        words, progress, value = self._words, self._region.progress(rank), mark(self._token, self._count)
        spin_until, sleep_s = 0.0, _FIRST_SLEEP_S
        while words[progress] < value:
            for _ in range(_SPINS_PER_LOOK):
                if words[progress] >= value:
                    break
            else:
                self.check()
                now = time.monotonic()
                spin_until = spin_until or now + _SPIN_S
                if now < spin_until:
                    os.sched_yield()
                else:
                    time.sleep(sleep_s)  # on the task's thread, which has nothing else to do
                    sleep_s = min(2 * sleep_s, _LONGEST_SLEEP_S)
        if token_of(words[progress]) != self._token:
            raise PeerLost(f"rank {rank} has gone on to another task")
        self._fence()

    def _is_over(self) -> bool:
        """Whether the task entered last is aborted."""
        return self._words[self._region.aborted(self._rank)] >= self._token

    def _fence(self) -> None:
        """No store or load moves across it: taking a lock acquires, leaving it releases."""
        with self._lock:
            pass
        with self._lock:
            pass


def _cut(tensors: Sequence[torch.Tensor], num_pieces: int, piece: int) -> list[torch.Tensor]:
    """One of so many pieces of each, along its tokens."""
    pieces = []
    for tensor in tensors:
        lengths = shares(tensor.shape[1], num_pieces)
        pieces.append(tensor.narrow(1, sum(lengths[:piece]), lengths[piece]))
    return pieces
