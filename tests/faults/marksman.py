"""Strikes workers while they do what a fault aims at."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.faults.faults import Aim, Fault, Kind
from tests.faults.feed import Feed, Task
from tests.faults.processes import find_fork_server, find_workers
from tests.faults.server import HEARTBEAT_TIMEOUT_S, Server

AIM_S = 1.5
"""How long to wait for what a fault aims at; then anything will do."""
STARVE_S = 3.0
SLOW_S = 3.0
_STOPPED_S, _RUNNING_S = 0.15, 0.05
_HOLD_S = 0.8
"""Idle workers are stopped for so long at most, until one of them is given a short task: far below the timeout."""
assert _HOLD_S < HEARTBEAT_TIMEOUT_S / 2


@dataclass(frozen=True, slots=True)
class Strike:
    """One worker struck, at `time_s` since the epoch. `is_up`: it was ready to work, and not starting."""

    kind: Kind
    aim: Aim
    rank: int
    time_s: float
    is_up: bool


@dataclass(frozen=True, slots=True)
class Hold:
    """A rank that was kept from working, from `start_s` to `end_s` since the epoch, and then went on."""

    rank: int
    start_s: float
    end_s: float


class Marksman:
    def __init__(self, server: Server, feed: Feed, random: Random) -> None:
        self.strikes: list[Strike] = []
        self.holds: list[Hold] = []
        self.fork_server_deaths_s: list[float] = []
        self._stopped: set[int] = set()  # for good: nothing else may wake them
        self._killed: set[int] = set()  # some of whom are still dying
        self._server = server
        self._feed = feed
        self._random = random

    async def strike(self, fault: Fault) -> None:
        """Do what `fault` says, to a worker that does what it aims at if one comes to do that soon."""
        match fault.aim:
            case Aim.ANY:
                await self._hit(fault, self._anyone())
            case Aim.ENCODE:
                await self._hold_and_hit(fault)
            case Aim.COLLECTIVE:
                await self._hit_during(fault, lambda task: len(task.ranks) > 1)
            case Aim.GROUP:
                await self._hit_during(fault, lambda task: len(task.ranks) > 1, num_ranks=2)
            case Aim.HANDOVER:
                await self._hit_during(fault, self._feed.is_handed_over)
            case Aim.DECODE:
                await self._hit_during(fault, lambda task: task.stage == "decode")
            case Aim.START | Aim.BESIDE:
                await self._hit_replacement(fault)
            case Aim.POOL:
                await self._hit(fault, sorted(self._workers()))
            case Aim.FORK_SERVER:
                pid = find_fork_server(self._server.pid)
                if pid is not None:
                    self.fork_server_deaths_s.append(time.time())
                    _signal(pid, signal.SIGKILL)
                await self._hit(fault, self._anyone())

    async def _hit_during(self, fault: Fault, is_wanted: Callable[[Task], bool], num_ranks: int = 1) -> None:
        aimed_at = self._feed.now_s

        def find() -> Task | None:
            wanted = [task for task in self._feed.running if task.start_s > aimed_at and is_wanted(task)]
            return self._random.choice(wanted) if wanted else None

        task = await self._feed.until(find, AIM_S)
        if task is None:
            await self._hit(fault, self._anyone())
            return
        await asyncio.sleep(self._random.uniform(0.0, max(0.0, task.end_s - self._feed.now_s)))
        await self._hit(fault, self._random.sample(task.ranks, num_ranks))

    async def _hold_and_hit(self, fault: Fault) -> None:
        """Encoding takes milliseconds: stop idle workers until one of them is to encode, let it begin, and strike."""
        busy = {rank for task in self._feed.running for rank in task.ranks}
        held = {rank: pid for rank, pid in self._workers().items() if rank in set(self._feed.ranks) - busy}

        def find() -> Task | None:
            running = self._feed.running
            return next((task for task in running if task.stage == "encode" and task.ranks[0] in held), None)

        start_s = time.time()
        try:
            for pid in held.values():
                _signal(pid, signal.SIGSTOP)
            task = await self._feed.until(find, _HOLD_S)
            if task is not None and self._random.random() < 0.5:  # before it begins
                await self._hit(fault, task.ranks, held)
                return
        finally:
            for pid in held.values():
                self._wake(pid)
            self.holds += [Hold(rank, start_s, time.time()) for rank in held]
        if task is None:
            await self._hit(fault, self._anyone())
        else:
            await asyncio.sleep(self._random.uniform(0.0, 0.004))
            await self._hit(fault, task.ranks, held)

    async def _hit_replacement(self, fault: Fault) -> None:
        """Kill one, wait for its replacement, and strike that, or another rank meanwhile."""
        workers = self._workers()
        if not workers:
            return  # faults were faster than replacements
        first = self._random.choice(sorted(workers))
        await self._hit(Fault(fault.at_s, Kind.KILL), [first])
        for _ in range(200):
            await asyncio.sleep(0.01)
            if self._workers().get(first, workers[first]) != workers[first]:
                break
        await asyncio.sleep(self._random.uniform(0.0, 0.5))
        others = sorted(set(self._workers()) - {first})
        await self._hit(fault, [first] if fault.aim is Aim.START or not others else [self._random.choice(others)])

    async def _hit(self, fault: Fault, ranks: Sequence[int], workers: Mapping[int, int] | None = None) -> None:
        """`workers`: their processes, if known already; to look for them takes longer than to encode a prompt."""
        workers = workers or self._workers()
        for rank in ranks:
            pid = workers.get(rank)
            if pid is None or pid in self._killed:
                continue  # it has just died
            self.strikes.append(Strike(fault.kind, fault.aim, rank, time.time(), rank in self._feed.ranks))
            match fault.kind:
                case Kind.KILL:
                    self._killed.add(pid)
                    _signal(pid, signal.SIGKILL)
                case Kind.STOP:
                    self._stopped.add(pid)
                    _signal(pid, signal.SIGSTOP)
                case Kind.SLOW:
                    start_s = time.time()
                    await self._slow(pid)
                    self.holds.append(Hold(rank, start_s, time.time()))
                case Kind.STARVE:
                    await _starve(pid)
                case _:
                    raise AssertionError(f"{fault.kind} is nothing that is done to a worker")

    async def _slow(self, pid: int) -> None:
        until = time.monotonic() + SLOW_S
        while time.monotonic() < until and _signal(pid, signal.SIGSTOP):
            await asyncio.sleep(_STOPPED_S)
            self._wake(pid)
            await asyncio.sleep(_RUNNING_S)

    def _wake(self, pid: int) -> None:
        if pid not in self._stopped:
            _signal(pid, signal.SIGCONT)

    def _anyone(self) -> list[int]:
        workers = sorted(self._workers())
        return [self._random.choice(workers)] if workers else []

    def _workers(self) -> dict[int, int]:
        return find_workers(self._server.pid)


async def _starve(pid: int) -> None:
    """Let the process have no more address space than it has, for a while."""
    with contextlib.suppress(OSError):
        num_bytes = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        with _limited(pid, num_bytes):
            await asyncio.sleep(STARVE_S)


@contextlib.contextmanager
def _limited(pid: int, num_bytes: int) -> Iterator[None]:
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (num_bytes, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it may have died of it
            resource.prlimit(pid, resource.RLIMIT_AS, before)


def _signal(pid: int, number: signal.Signals) -> bool:
    """Whether the process was still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
