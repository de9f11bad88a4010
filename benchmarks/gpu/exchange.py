"""An all-to-all without process groups: ranks stage their part in memory that all have mapped, and count in cells.

Each pair of ranks has a cell in the receiver's region, written by the sender alone. A cell holds the token of the
present task in its upper half and the number of the exchange in its lower one, so that it only ever grows, and what an
aborted task left in it is never mistaken for a later one's. Two slots for what is staged, in turns, make one wait per
exchange enough: who arrives at an exchange has pulled what the one before it staged.

On a GPU the cells are written and waited for by kernels, and the numbers are kept in device memory, so that exchanges
can be captured in a graph. A waiting kernel reads the abort word in host memory and gives up with a status; it does not
trap, which would end its context.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from regions import Region, checked, share_with_device

MAX_RANKS = 8
HEAD_BYTES = 4096
"""The cells, before the two slots."""
WAITED, ABORTED, TIMED_OUT = range(3)
STATUS_NAMES = ("waited", "aborted", "timed out")
_TOKEN_SHIFT = 32

_SOURCE = b"""
extern "C" __global__ void arrive(unsigned long long* sent, unsigned long long* cell) {
    unsigned long long number = *sent + 1;
    *sent = number;
    __threadfence_system();
    asm volatile("st.release.sys.global.u64 [%0], %1;" :: "l"(cell), "l"(number) : "memory");
}

extern "C" __global__ void wait(
    unsigned long long* expected, unsigned long long* cell, const volatile unsigned long long* aborted,
    unsigned long long* status, unsigned long long limit_ns
) {
    unsigned long long number = *expected + 1, seen, begun, now;
    *expected = number;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begun));
    while (*status == 0) {
        asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(seen) : "l"(cell) : "memory");
        if (seen >= number) return;
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
        if (*aborted == number >> 32) *status = 1;
        else if (now - begun > limit_ns) *status = 2;
        else __nanosleep(200);
    }
}
"""


class Words(Protocol):
    """A barrier: a rank stores its sequence number, and waits for those of its peers."""

    def enter(self, token: int) -> None: ...

    def arrive(self, peer: int) -> None: ...

    def wait(self, peer: int) -> None: ...

    def status(self) -> int:
        """Of all waits since `enter`: the first that failed counts, and those after it do not wait."""
        ...


class Exchange:
    """One rank's part. regions: of all ranks, its own included. aborted: the word that ends waits of its token."""

    def __init__(
        self, rank: int, regions: Mapping[int, Region], aborted: torch.Tensor, device: torch.device, limit_s: float
    ) -> None:
        self._rank = rank
        self._regions = dict(regions)
        kind = HostWords if device.type == "cpu" else DeviceWords
        self._words: Words = kind(rank, self._regions, aborted, limit_s)
        self._ranks: tuple[int, ...] = ()
        self._parity = 0

    def enter(self, ranks: tuple[int, ...], token: int) -> None:
        """The next exchanges are among `ranks`, none of which is in another task; tokens grow."""
        self._ranks, self._parity = ranks, 0
        self._words.enter(token)

    def put(self, peer: int, region: Region) -> None:
        """A new process has taken the place of `peer`."""
        self._regions[peer] = region

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """Part i of `x`, cut along its first dimension, goes to the i-th rank; the parts come in the same order."""
        parts = self._staged(self._rank, x)
        parts.copy_(x)
        peers = [rank for rank in self._ranks if rank != self._rank]
        for peer in peers:
            self._words.arrive(peer)
        for peer in peers:
            self._words.wait(peer)
        index, size = self._ranks.index(self._rank), x.shape[0] // len(self._ranks)
        mine = slice(index * size, (index + 1) * size)
        pulled = torch.cat([self._staged(rank, x)[mine] for rank in self._ranks])
        self._parity ^= 1
        return pulled

    def status(self) -> int:
        return self._words.status()

    def _staged(self, rank: int, like: torch.Tensor) -> torch.Tensor:
        """What `rank` stages in this exchange."""
        slots = self._regions[rank].bytes[HEAD_BYTES:]
        slot = slots[: slots.numel() // 2] if self._parity == 0 else slots[slots.numel() // 2 :]
        return slot[: like.nbytes].view(like.dtype).view(like.shape)


class HostWords:
    """Cells in shared memory of the host."""

    def __init__(self, rank: int, regions: Mapping[int, Region], aborted: torch.Tensor, limit_s: float) -> None:
        self._rank = rank
        self._regions = regions
        self._aborted = aborted
        self._limit_s = limit_s
        self._sent: dict[int, int] = {}
        self._expected: dict[int, int] = {}
        self._token = 0
        self._status = WAITED

    def enter(self, token: int) -> None:
        self._token, self._status = token, WAITED
        self._sent = dict.fromkeys(range(MAX_RANKS), token << _TOKEN_SHIFT)
        self._expected = dict(self._sent)

    def arrive(self, peer: int) -> None:
        self._sent[peer] += 1
        self._cells(peer)[self._rank] = self._sent[peer]

    def wait(self, peer: int) -> None:
        self._expected[peer] += 1
        cells, gives_up_at = self._cells(self._rank), time.monotonic() + self._limit_s
        while self._status == WAITED and int(cells[peer]) < self._expected[peer]:
            if int(self._aborted[0]) == self._token:
                self._status = ABORTED
            elif time.monotonic() > gives_up_at:
                self._status = TIMED_OUT
            else:
                time.sleep(0)

    def status(self) -> int:
        return self._status

    def _cells(self, rank: int) -> torch.Tensor:
        return self._regions[rank].bytes[: 8 * MAX_RANKS].view(torch.int64)


class DeviceWords:
    """Cells in device memory, written and read by kernels of one thread."""

    def __init__(self, rank: int, regions: Mapping[int, Region], aborted: torch.Tensor, limit_s: float) -> None:
        self._rank = rank
        self._regions = regions
        self._aborted = aborted
        share_with_device(aborted)
        self._arrive, self._wait = compile_kernels("arrive", "wait")
        self._limit_ns = int(limit_s * 1e9)
        self._sent, self._expected = (torch.zeros(MAX_RANKS, dtype=torch.int64, device="cuda") for _ in range(2))
        self._status = torch.zeros(1, dtype=torch.int64, device="cuda")

    def enter(self, token: int) -> None:
        self._sent.fill_(token << _TOKEN_SHIFT)
        self._expected.copy_(self._sent)
        self._status.zero_()

    def arrive(self, peer: int) -> None:
        launch(self._arrive, self._sent.data_ptr() + 8 * peer, self._cell(peer, self._rank))

    def wait(self, peer: int) -> None:
        launch(
            self._wait,
            self._expected.data_ptr() + 8 * peer,
            self._cell(self._rank, peer),
            self._aborted.data_ptr(),
            self._status.data_ptr(),
            self._limit_ns,
        )

    def status(self) -> int:
        return int(self._status.item())

    def _cell(self, owner: int, sender: int) -> int:
        """Address of the cell in which `owner` sees how far `sender` is."""
        return self._regions[owner].bytes.data_ptr() + 8 * sender


def compile_kernels(*names: str) -> list[Any]:
    """Functions of `_SOURCE` for the present device."""
    from cuda.bindings import driver, nvrtc

    major, minor = torch.cuda.get_device_capability()
    module = checked(driver.cuModuleLoadData(build(f"sm_{major}{minor}", nvrtc)))
    return [checked(driver.cuModuleGetFunction(module, name.encode())) for name in names]


def build(architecture: str, nvrtc: Any) -> bytes:
    """Machine code of `_SOURCE`; needs no device."""
    program = checked(nvrtc.nvrtcCreateProgram(_SOURCE, b"exchange.cu", 0, [], []))
    options = [f"--gpu-architecture={architecture}".encode()]
    (code,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(code) != 0:
        log = b" " * int(checked(nvrtc.nvrtcGetProgramLogSize(program)))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(log.decode())
    binary = b" " * int(checked(nvrtc.nvrtcGetCUBINSize(program)))
    checked(nvrtc.nvrtcGetCUBIN(program, binary))
    return binary


def launch(function: Any, *arguments: int) -> None:
    """On one thread, behind what the present stream has to do. All arguments are addresses or numbers of 64 bits."""
    from cuda.bindings import driver

    stream = torch.cuda.current_stream().cuda_stream
    parameters = arguments, (ctypes.c_uint64,) * len(arguments)
    checked(driver.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, parameters, 0))
