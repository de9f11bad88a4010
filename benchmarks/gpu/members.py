"""Processes that share memory and do what they are told, one call at a time; what `collectives.py` is made of."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from exchange import HEAD_BYTES, STATUS_NAMES, WAITED, Exchange
from regions import Region, make_region, map_region

WORDS_BYTES = 4096
CALL_LIMIT_S = 90.0
_SYMMETRIC_LIMIT_MS = 20_000
Context = SpawnContext | ForkServerContext
_present: list[Exchange] = []
"""The exchange that `team_all_to_all` goes through: where the compiler does not see it."""


@torch.library.custom_op("tetriserve_bench::all_to_all", mutates_args=())
def team_all_to_all(x: torch.Tensor) -> torch.Tensor:
    return _present[0].all_to_all(x)


@team_all_to_all.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _block(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As a block of a transformer, whose attention stands between two exchanges."""
    there = team_all_to_all(torch.nn.functional.silu(x @ weights))
    return x + team_all_to_all(there @ weights)  # type: ignore[no-any-return]


class Member:
    """What one process can be asked. Calls and answers go through a pipe, file descriptors through a socket."""

    def __init__(self, rank: int, device: torch.device, descriptors: socket.socket) -> None:
        self._rank = rank
        self._device = device
        self._descriptors = descriptors
        self._regions: dict[int, Region] = {}
        self._shared: torch.Tensor | None = None
        self._aborted = torch.zeros(0, dtype=torch.int64)
        self._exchange: Exchange | None = None
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._compiled: Callable[..., torch.Tensor] | None = None

    def open(self, num_bytes: int) -> None:
        """Take the words from the socket, make a region, and give its descriptor away."""
        words = map_region(self._receive(), WORDS_BYTES, torch.device("cpu"))
        self._aborted = words.bytes.view(torch.int64)[:1]
        region = make_region(num_bytes, self._device)
        region.bytes.fill_(self._rank + 1)
        region.bytes[:HEAD_BYTES].zero_()
        self._settle()
        self._regions[self._rank] = region
        self.export()

    def export(self) -> None:
        socket.send_fds(self._descriptors, [b"."], [self._regions[self._rank].fd])

    def map(self, peer: int, num_bytes: int) -> float:
        """Map the region whose descriptor comes through the socket; seconds."""
        fd = self._receive()
        started_at = time.perf_counter()
        region = self._regions[peer] = map_region(fd, num_bytes, self._device)
        elapsed_s = time.perf_counter() - started_at
        os.close(fd)
        assert int(region.bytes[-1]) == peer + 1, "it is another region, or not there yet"
        if self._exchange is not None:
            self._exchange.put(peer, region)
        return elapsed_s

    def join(self, limit_s: float) -> None:
        """All regions are mapped: make the exchange."""
        self._exchange = Exchange(self._rank, self._regions, self._aborted, self._device, limit_s)

    def exchange(self, ranks: tuple[int, ...], token: int, num_bytes: int, num_times: int) -> tuple[str, float]:
        """Exchanges among `ranks`, each checked: the status, and the median seconds of one."""
        assert self._exchange is not None
        self._exchange.enter(ranks, token)
        taken = []
        for number in range(num_times):
            x = self._part(self._rank, ranks, number, num_bytes)
            self._settle()
            started_at = time.perf_counter()
            pulled = self._exchange.all_to_all(x)
            self._settle()
            taken.append(time.perf_counter() - started_at)
            if (status := self._exchange.status()) != WAITED:
                return STATUS_NAMES[status], statistics.median(taken)
            self._check(pulled, ranks, number, num_bytes)
        return STATUS_NAMES[WAITED], statistics.median(taken)

    def form_groups(self, store: Path, num_ranks: int, sets: Sequence[tuple[int, ...]]) -> None:
        """Process groups of gloo, one for each of `sets`, all over one of all ranks."""
        self._meet(store, num_ranks)
        self._groups = {ranks: dist.new_group(list(ranks)) for ranks in sets}

    def _meet(self, store: Path, num_ranks: int) -> None:
        meeting = dist.FileStore(str(store), num_ranks)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=meeting, rank=self._rank, world_size=num_ranks)

    def exchange_with_gloo(self, ranks: tuple[int, ...], num_bytes: int, num_times: int) -> tuple[str, float]:
        """As `exchange`, through the process group of `ranks`, whose order it is given in."""
        taken = []
        for number in range(num_times):
            x = self._part(self._rank, ranks, number, num_bytes)
            pulled = torch.empty_like(x)
            self._settle()
            started_at = time.perf_counter()
            dist.all_to_all_single(pulled, x, group=self._groups[ranks])
            self._settle()
            taken.append(time.perf_counter() - started_at)
            self._check(pulled, ranks, number, num_bytes)
        return STATUS_NAMES[WAITED], statistics.median(taken)

    def exchange_symmetrically(
        self, store: Path, num_ranks: int, sets: Sequence[tuple[int, ...]], num_bytes: int
    ) -> str:
        """The same through torch's symmetric memory, among each of `sets` in turn; ranks not in a set skip it."""
        import torch.distributed._symmetric_memory as symmetric

        self._meet(store, num_ranks)
        symmetric.set_backend("CUDA")
        staged = symmetric.empty(num_bytes, dtype=torch.uint8, device=self._device)
        assert dist.group.WORLD is not None
        handle = symmetric.rendezvous(staged, dist.group.WORLD)
        for number, ranks in enumerate(sets):
            if self._rank not in ranks:
                continue
            staged.copy_(self._part(self._rank, ranks, number, num_bytes))
            peers = [rank for rank in ranks if rank != self._rank]
            self._signal(handle, peers)
            index, size = ranks.index(self._rank), num_bytes // len(ranks)
            parts = [handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in ranks]
            pulled = torch.cat([part[index * size : (index + 1) * size] for part in parts])
            self._signal(handle, peers)  # before what was staged is written over
            self._settle()
            self._check(pulled, ranks, number, num_bytes)
        return STATUS_NAMES[WAITED]

    def _signal(self, handle: Any, peers: Sequence[int]) -> None:
        for peer in peers:
            handle.put_signal(peer, 0, _SYMMETRIC_LIMIT_MS)
        for peer in peers:
            handle.wait_signal(peer, 0, _SYMMETRIC_LIMIT_MS)

    def share(self, num_bytes: int) -> bytes:
        """Memory of torch's allocator, as torch hands it to another process (CUDA IPC)."""
        self._shared = torch.full((num_bytes,), self._rank + 1, dtype=torch.uint8, device=self._device)
        self._settle()
        return bytes(ForkingPickler.dumps(self._shared))

    def take(self, owner: int, shared: bytes) -> None:
        self._regions[owner] = Region(pickle.loads(shared), -1, None)

    def read(self, owner: int, seconds: float) -> tuple[int, int]:
        """Read the mapping of `owner` for so long: how often, and how often it was not what the owner wrote."""
        num_reads = num_wrong = 0
        ends_at = time.monotonic() + seconds
        while time.monotonic() < ends_at:
            copy = self._regions[owner].bytes[HEAD_BYTES:].clone()
            num_wrong += not bool((copy == owner + 1).all())
            num_reads += 1
        return num_reads, num_wrong

    def unmap(self, owner: int) -> float:
        """The bytes of the device that were free after it, less those before."""
        before = self._num_free()
        self._regions.pop(owner).unmap()
        return self._num_free() - before

    def fail_to_meet(self, ranks: tuple[int, ...], token: int) -> tuple[str, float, float]:
        """Wait for peers that do not come: the status, when the wait ended (monotonic), and then a sum of 64 ones."""
        assert self._exchange is not None
        self._exchange.enter(ranks, token)
        self._exchange.all_to_all(torch.zeros(64 * len(ranks), dtype=torch.uint8, device=self._device))
        status = self._exchange.status()
        ended_at = time.monotonic()
        return STATUS_NAMES[status], ended_at, torch.ones(64, device=self._device).sum().item()

    def run_compiled(self, ranks: tuple[int, ...], token: int, compiler: str, side: int) -> int:
        """A function compiled when first needed, in the exchange of `ranks`; how many graphs there are after it."""
        assert self._exchange is not None
        _present[:] = [self._exchange]
        if self._compiled is None:
            self._compiled = torch.compile(_block, fullgraph=True, backend=compiler)
        torch.manual_seed(self._rank)
        x = torch.randn(12, side, device=self._device)
        weights = torch.eye(side, device=self._device) * 2
        self._exchange.enter(ranks, token)
        expected = _block(x, weights)
        torch.testing.assert_close(self._compiled(x, weights), expected, rtol=1e-3, atol=1e-3)
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    def replay(self, ranks: tuple[int, ...], token: int, num_bytes: int, num_times: int) -> tuple[str, float]:
        """Two exchanges, one for each slot, captured once and replayed, each checked: as `exchange`."""
        assert self._exchange is not None
        exchange = self._exchange
        exchange.enter(ranks, token)
        x = self._part(self._rank, ranks, 0, num_bytes)

        def twice() -> torch.Tensor:
            return exchange.all_to_all(exchange.all_to_all(x))

        run, output = self._capture(twice)
        taken = []
        for number in range(num_times):
            x.copy_(self._part(self._rank, ranks, number, num_bytes))
            self._settle()
            started_at = time.perf_counter()
            run()
            self._settle()
            taken.append(time.perf_counter() - started_at)
            if (status := exchange.status()) != WAITED:
                return STATUS_NAMES[status], statistics.median(taken)
            assert torch.equal(output, x), "two exchanges bring every part back"
        return STATUS_NAMES[WAITED], statistics.median(taken)

    def _capture(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        """What runs `work`, and where its result is then. Capturing does not run it; on a CPU nothing is captured."""
        if self._device.type == "cpu":
            output = torch.empty(0, dtype=torch.uint8)

            def run() -> None:
                result = work()
                output.resize_(result.shape).copy_(result)

            return run, output
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = work()
        return graph.replay, output

    def _part(self, rank: int, ranks: Sequence[int], number: int, num_bytes: int) -> torch.Tensor:
        """What `rank` puts into the exchange `number`: each part says from whom, to whom and when."""
        parts = [
            torch.full((num_bytes // len(ranks),), (17 * rank + 5 * to + number) % 251, dtype=torch.uint8)
            for to in range(len(ranks))
        ]
        return torch.cat(parts).to(self._device)

    def _check(self, pulled: torch.Tensor, ranks: Sequence[int], number: int, num_bytes: int) -> None:
        index, size = ranks.index(self._rank), num_bytes // len(ranks)
        mine = slice(index * size, (index + 1) * size)
        expected = torch.cat([self._part(rank, ranks, number, num_bytes)[mine] for rank in ranks])
        assert torch.equal(pulled, expected), f"exchange {number} among {ranks} brought other parts"

    def _receive(self) -> int:
        _, [fd], _, _ = socket.recv_fds(self._descriptors, 1, 1)
        return int(fd)

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _num_free(self) -> float:
        self._settle()
        return float(torch.cuda.mem_get_info()[0]) if self._device.type == "cuda" else 0.0


def _serve(rank: int, device: torch.device, connection: Connection, descriptors: socket.socket) -> None:
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # makes the context, which calls of the driver need
    member = Member(rank, device, descriptors)
    while True:
        try:
            number, method, arguments = connection.recv()
        except EOFError:
            os._exit(0)  # torch's own teardown may wait for peers
        try:
            connection.send((number, None, getattr(member, method)(*arguments)))
        except Exception as error:  # the process boundary
            connection.send((number, f"{type(error).__name__}: {error}".splitlines()[0], None))


class MemberFailed(RuntimeError):
    """A member's call failed, took too long, or the member is gone; one line says which."""


class Process:
    """The other end of a member."""

    def __init__(self, context: Context, rank: int, device: torch.device) -> None:
        self.rank = rank
        self._num_calls = 0
        self._connection, theirs = context.Pipe()
        self.descriptors, other = socket.socketpair()
        self.process: BaseProcess = context.Process(target=_serve, args=(rank, device, theirs, other), daemon=True)
        self.process.start()
        theirs.close()
        other.close()

    def begin(self, method: str, *arguments: object) -> None:
        self._num_calls += 1
        with contextlib.suppress(OSError):  # it is gone, as the answer will say
            self._connection.send((self._num_calls, method, arguments))

    def answer(self) -> Any:
        """Of the call that was begun last; those of calls before it, after which a section went on, are left out.

        Raises:
            MemberFailed: the call failed, or there is no answer.
        """
        number = 0
        while number != self._num_calls:
            try:
                if not self._connection.poll(CALL_LIMIT_S):
                    raise MemberFailed(f"rank {self.rank} has not answered within {CALL_LIMIT_S:g} s")
                number, problem, result = self._connection.recv()
            except (EOFError, OSError):
                raise MemberFailed(f"rank {self.rank} is gone") from None
        if problem is not None:
            raise MemberFailed(f"rank {self.rank}: {problem}")
        return result

    def call(self, method: str, *arguments: object) -> Any:
        self.begin(method, *arguments)
        return self.answer()

    def kill(self) -> float:
        """End it as `kill -9` does, and see it ended; when that was seen (monotonic)."""
        self.process.kill()
        self.process.join(CALL_LIMIT_S)
        return time.monotonic()


class Members:
    """Processes of ranks 0 to `num_ranks` - 1 on one device, each with a region that all have mapped."""

    def __init__(self, context: Context, num_ranks: int, device: torch.device, num_bytes: int) -> None:
        self._context = context
        self._device = device
        self._num_bytes = num_bytes
        self._words = make_region(WORDS_BYTES, torch.device("cpu"))
        self._num_tokens = 0
        self._processes = {rank: Process(context, rank, device) for rank in range(num_ranks)}

    def __getitem__(self, rank: int) -> Process:
        return self._processes[rank]

    def call(self, ranks: Sequence[int], method: str, *arguments: object) -> list[Any]:
        """At once on all of `ranks`; their answers in that order."""
        for rank in ranks:
            self[rank].begin(method, *arguments)
        return [self[rank].answer() for rank in ranks]

    def next_token(self, count: int = 1) -> int:
        """The first of `count` tokens that no task has had."""
        first = self._num_tokens + 1
        self._num_tokens += count
        return first

    def abort(self, token: int) -> float:
        """Write the abort word; when that was done (monotonic)."""
        self._words.bytes.view(torch.int64)[0] = token
        return time.monotonic()

    def connect(self, limit_s: float) -> list[float]:
        """Map every region everywhere; seconds of each mapping."""
        ranks = [*self._processes]
        for rank in ranks:
            self[rank].begin("open", self._num_bytes)
            socket.send_fds(self[rank].descriptors, [b"."], [self._words.fd])
        fds = {}
        for rank in ranks:
            self[rank].answer()
            _, [fds[rank]], _, _ = socket.recv_fds(self[rank].descriptors, 1, 1)
        taken = [self._give(fds[owner], owner, peer) for owner in ranks for peer in ranks if peer != owner]
        for fd in fds.values():
            os.close(fd)
        self.call(ranks, "join", limit_s)
        return taken

    def replace(self, rank: int, limit_s: float) -> float:
        """A new process in the place of one that has ended, mapped by and mapping all others; seconds."""
        started_at = time.monotonic()
        process = self._processes[rank] = Process(self._context, rank, self._device)
        process.begin("open", self._num_bytes)
        socket.send_fds(process.descriptors, [b"."], [self._words.fd])
        process.answer()
        _, [fd], _, _ = socket.recv_fds(process.descriptors, 1, 1)
        for peer in self._processes.keys() - {rank}:
            self._give(fd, rank, peer)
            self[peer].call("export")
            _, [peer_fd], _, _ = socket.recv_fds(self[peer].descriptors, 1, 1)
            self._give(peer_fd, peer, rank)
            os.close(peer_fd)
        os.close(fd)
        process.call("join", limit_s)
        return time.monotonic() - started_at

    def _give(self, fd: int, owner: int, peer: int) -> float:
        self[peer].begin("map", owner, self._num_bytes)
        socket.send_fds(self[peer].descriptors, [b"."], [fd])
        return float(self[peer].answer())

    def end(self) -> None:
        for process in self._processes.values():
            process.kill()


@contextmanager
def gathered(context: Context, num_ranks: int, device: torch.device, num_bytes: int) -> Iterator[Members]:
    members = Members(context, num_ranks, device, num_bytes)
    try:
        yield members
    finally:
        members.end()
