"""Whose fault an error is, and how soon the end of a process shows."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import select
import shutil
import signal
import time
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from tests.waiting import HANG_S, until
from tetriserve.config import PoolConfig
from tetriserve.core.events import FailureKind
from tetriserve.core.states import StoreError
from tetriserve.executor.processes import ProcessStarter, kill_process
from tetriserve.models.card import ModelCard
from tetriserve.models.team import PeerLost
from tetriserve.worker import store
from tetriserve.worker.bundle import arrays_of
from tetriserve.worker.failures import failure_kind
from tetriserve.worker.lifeline import hold
from tetriserve.worker.store import StoreDirectory, TensorStore

ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("std::bad_alloc"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(ALLOCATOR),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:20]}",
)
def test_memory_that_ran_out_is_nobodys_fault(error: Exception) -> None:
    assert failure_kind(error) is FailureKind.MEMORY


def test_other_errors_are_the_requests_own_or_a_lost_peers() -> None:
    assert failure_kind(RuntimeError("expected 3 dimensions, got 4")) is FailureKind.STEP
    assert failure_kind(ValueError("a prompt about being out of memory")) is FailureKind.STEP
    assert failure_kind(PeerLost("a peer is gone: the task was aborted")) is FailureKind.LOST


def test_whatever_a_starved_process_says_is_memory() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    num_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, before[1]))
    try:
        kind = failure_kind(RuntimeError("could not create a primitive"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert kind is FailureKind.MEMORY


def test_a_copy_that_finds_no_room_leaves_nothing_behind(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(Exception, match=r"File too large|os error 27"):
            TensorStore(tmp_path).save("a.denoise.1.1", {"latents": torch.zeros(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        StoreError(errno.ENOENT, "a copy was removed from the tensor store"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_store_without_room_or_files_is_the_hosts_trouble(error: Exception) -> None:
    assert failure_kind(error) is FailureKind.STORE


def full_disk(*arguments: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_copy_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []
    save_file = safetensors.torch.save_file
    monkeypatch.setattr(
        safetensors.torch, "save_file", lambda *given: full_disk() if len(looks) < 3 else save_file(*given)
    )
    monkeypatch.setattr(time, "sleep", looks.append)
    ref = TensorStore(tmp_path).save("a.encode.0.0", {"embeds": torch.ones(5000)})
    assert len(looks) == 3
    assert arrays_of(TensorStore(tmp_path).get(ref))["embeds"].sum() == 5000


def test_a_copy_that_waits_for_room_in_vain_is_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_ROOM_TIMEOUT_S", -1)
    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(StoreError, match="the tensor store is full"):
        TensorStore(tmp_path).save("a.encode.0.0", {"embeds": torch.ones(5000)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_bytes", [4, store._MAPPED_BYTES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_state_is_loaded_as_it_was_saved_whatever_its_size(
    tmp_path: Path, num_bytes: int, dtype: torch.dtype
) -> None:
    saved = {"latents": torch.arange(num_bytes // dtype.itemsize).to(dtype)[None], "noise_level": torch.tensor(0.5)}
    states = TensorStore(tmp_path)
    ref = states.save("a.denoise.1.1", saved)
    loaded = states.load(ref, "cpu")
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    loaded["latents"].zero_()
    assert torch.equal(states.load(ref, "cpu")["latents"], saved["latents"]), "what a rank writes stays its own"


def test_a_store_that_was_removed_says_so_and_can_be_restored() -> None:
    directory = StoreDirectory()
    store = TensorStore(directory.path)
    refs = [store.save(f"a.encode.0.{size}", {"embeds": torch.ones(size)}) for size in (5, 2**20)]
    shutil.rmtree(directory.path)
    for ref in refs:
        with pytest.raises(StoreError, match="a copy was removed"):
            store.load(ref, "cpu")
    with pytest.raises(StoreError, match="the tensor store was removed"):
        store.save("a.encode.0.0", {"embeds": torch.ones(5)})
    directory.restore()
    store.save("a.encode.0.0", {"embeds": torch.ones(5)})
    other = StoreDirectory()
    assert directory.path.exists(), "it is locked again, so that no other server takes it for left behind"
    other.remove()
    directory.remove()
    assert not directory.path.exists()


def test_a_panic_of_the_library_is_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As Rust's, which is no Exception either."""

    def panic(*arguments: object) -> None:
        raise PanicException("memory allocation of 12 bytes failed")

    ref = TensorStore(tmp_path).save("a.decode.0.2", {"pixels": torch.ones(5)})
    monkeypatch.setattr(safetensors, "deserialize", panic)
    with pytest.raises(MemoryError, match="PanicException: memory allocation"):
        arrays_of(TensorStore(tmp_path).get(ref))


def test_the_lifeline_of_a_killed_process_ends_though_its_other_files_are_held_open() -> None:
    lifeline, held = multiprocessing.Pipe(duplex=False)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_live, args=(held, theirs))
    process.start()
    held.close()
    assert ours.recv() is True, "the process has given its end away, to a thread that dies first"
    assert not lifeline.poll(0.2), "it holds it for as long as it lives"
    assert process.pid is not None
    handle = os.pidfd_open(process.pid)
    process.kill()
    assert lifeline.poll(HANG_S)
    with pytest.raises(EOFError):
        lifeline.recv()
    assert select.select([handle], [], [], HANG_S) == ([handle], [], [])
    os.close(handle)
    process.join()


async def test_orphans_of_a_dead_fork_server_can_still_be_killed_and_the_server_is_started_again(
    bundled_card: ModelCard,
) -> None:
    starter = ProcessStarter([bundled_card], PoolConfig(num_ranks=1))
    process = starter.context.Process(target=time.sleep, args=(10 * HANG_S,))  # type: ignore[attr-defined]
    await starter.start(process)
    assert process.pid is not None
    handle = os.pidfd_open(process.pid)
    server_pid = forkserver._forkserver._forkserver_pid
    os.kill(server_pid, signal.SIGKILL)
    process.join(HANG_S)
    assert process.exitcode == 255, "multiprocessing takes it for dead"
    assert select.select([handle], [], [], 0) == ([], [], []), "but it lives"
    kill_process(process)
    assert select.select([handle], [], [], HANG_S) == ([handle], [], [])
    os.close(handle)
    starter.keep_fork_server()
    await until(lambda: forkserver._forkserver._forkserver_pid not in (None, server_pid))


def _live(held: Connection, theirs: Connection) -> None:
    hold(held)
    theirs.send(held.closed)
    time.sleep(10 * HANG_S)
