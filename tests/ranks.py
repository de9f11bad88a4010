"""Ranks as bare processes with a team: what tests of exchanges need of a pool, and no more."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests.waiting import HANG_S
from tetriserve.worker.team import Region, groups
from tetriserve.worker.team.shm import ShmTeam

Body = Callable[..., Any]
"""Called in the process of each rank with its team, its rank and whatever else; it may wait for orders."""
LONG_S = 5 * HANG_S
SMALL_SLOT_BYTES = 2**15
_MEETS = "meets"


def team_of(kind: str, region: Region, rank: int, directory: Path, max_groups: int = 4) -> ShmTeam:
    if kind == "shm":
        return ShmTeam(region, rank)
    groups._CONNECTING_TIMEOUT = timedelta(seconds=HANG_S)
    return groups.GroupTeam(region, rank, "gloo", directory, HANG_S, max_groups)


class Ranks:
    """One process per rank, each with our end of a pipe to it."""

    def __init__(self, body: Body, kind: str, num_ranks: int, directory: Path, *args: Any) -> None:
        self._body, self._kind, self._directory, self._args = body, kind, directory, args
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.ranks", "tetriserve.models.preload"])
        self.region = Region(num_ranks, SMALL_SLOT_BYTES if kind == "shm" else 0)
        self.processes: dict[int, BaseProcess] = {}
        self.ends: dict[int, Connection] = {}
        for rank in range(num_ranks):
            self.start(rank)

    def start(self, rank: int) -> None:
        """A process for `rank`, in place of the last."""
        self.ends[rank], theirs = self._context.Pipe()
        self.processes[rank] = self._context.Process(
            target=_run,
            args=(self._body, self._kind, self.region, rank, self._directory, theirs, *self._args),
            daemon=True,
        )
        self.processes[rank].start()
        theirs.close()

    def hear(self, rank: int) -> Any:
        """What the body says next; an error that it ended with is raised here."""
        assert self.ends[rank].poll(LONG_S), f"rank {rank} is silent"
        heard = self.ends[rank].recv()
        if isinstance(heard, Exception):
            raise heard
        return heard

    def results(self) -> list[Any]:
        """What the body returns on each rank; those that `meet` meanwhile meet all others."""
        while True:
            heard = [self.hear(rank) for rank in self.ends]
            if not all(isinstance(each, str) and each == _MEETS for each in heard):
                return heard
            for end in self.ends.values():
                end.send(None)

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()
        self.region.close()


@contextmanager
def ranks(body: Body, kind: str, num_ranks: int, directory: Path, *args: Any) -> Iterator[Ranks]:
    made = Ranks(body, kind, num_ranks, directory, *args)
    try:
        yield made
    finally:
        made.close()


def results_of(body: Body, kind: str, num_ranks: int, directory: Path, *args: Any) -> list[Any]:
    """What the body returns on each rank."""
    with ranks(body, kind, num_ranks, directory, *args) as made:
        return made.results()


def meet(end: Connection) -> None:
    """Called by a body: wait for all ranks. As in a pool, a team is entered when all have left the one before."""
    end.send(_MEETS)
    end.recv()


def _run(body: Body, kind: str, region: Region, rank: int, directory: Path, end: Connection, *args: Any) -> None:
    torch.set_num_threads(1)
    team = team_of(kind, region, rank, directory)
    try:
        result = body(team, rank, end, *args)
    except Exception as error:
        traceback.print_exc()
        team.abort()
        result = RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")
    end.send(result)
    end.poll(None)  # until it is killed: an end would close what others still read
