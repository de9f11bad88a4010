"""How worker processes begin and end.

All are started by one thread, which lives as long as this process: it is with the starting thread that the kernel ends
a child (`worker.parent`), and a start may block for as long as the fork server is busy, stopped or stuck.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import cache, partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext, ForkServerContext
from multiprocessing.process import BaseProcess

from tetriserve.config import PoolConfig
from tetriserve.models.card import ModelCard
from tetriserve.models.registry import family_of

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 5.0
_GRACE_S = 1.0
"""For what takes milliseconds unless somebody is stuck."""
_ORPHANED = 255
"""What multiprocessing takes for the exit code of every process whose parent, the fork server, has died."""
_DEFAULTS = {
    # Of glibc, which would give activations back after each layer and have them faulted in again: a tenth of a step.
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
    "MALLOC_MMAP_THRESHOLD_": str(2**28),
    "GLOO_SOCKET_IFNAME": "lo",  # ranks of this host meet on loopback
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_NVLS_ENABLE": "0",  # hundreds of MB in each group
    "NCCL_MAX_CTAS": "8",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # it would end the process where a peer is lost; the team aborts instead
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # a thread that asks the store of the group all the time
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # that of nvidia-smi
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # so that asking for CUDA does not initialise it in the fork server
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # requests of many sizes would fragment memory
}
"""Of what users may set themselves."""
_lock = threading.Lock()


class NoProcess(Exception):
    """A process did not start, and nothing is left of it; one line says why."""


class ProcessStarter:
    """Starts the processes of one executor, one at a time, and sees to the fork server where there is one."""

    def __init__(self, cards: Sequence[ModelCard], pool: PoolConfig) -> None:
        self._pool = pool
        self.context: BaseContext = _start_context(cards)
        self._turn = asyncio.Lock()
        self._processes: list[BaseProcess] = []

    async def start(self, process: BaseProcess, *, patience: float = 1.0) -> None:
        """Start it with the environment that workers need.

        A fork server that does not answer is ended, and the next start has another: one that has yet to load its
        libraries is waited for as long as workers are, one that has forked before for `patience` times a worker's
        silence. A start that is cancelled leaves nothing either.

        Raises:
            NoProcess: no process, no memory, or no fork server at the moment.
        """
        async with self._turn:
            begun = _starting_thread().submit(partial(_start, process, self._pool))
            start = asyncio.wrap_future(begun)
            patience_s = patience * self._pool.heartbeat_timeout_s if _has_forked() else self._pool.start_timeout_s
            try:
                await asyncio.wait({start}, timeout=patience_s)
            except asyncio.CancelledError:
                await self._break_off(begun, start, process)
                raise
            if not start.done():
                await self._break_off(begun, start, process)
                raise NoProcess(f"the fork server did not answer within {patience_s:g} s, and was ended")
            try:
                start.result()
            except (EOFError, ConnectionError):
                raise NoProcess("the fork server ended") from None
            except (OSError, RuntimeError, MemoryError) as error:  # RuntimeError: no thread
                raise NoProcess(f"{type(error).__name__}: {error}") from error
            self._processes = [*filter(_may_live, self._processes), process]

    def keep_fork_server(self) -> None:
        """Start the fork server again if it has died: that takes seconds, for which a replacement would wait."""
        if isinstance(self.context, ForkServerContext) and not self._turn.locked():  # else it is looked after just now
            _starting_thread().submit(partial(_keep_fork_server, self._pool))

    async def reap(self) -> None:
        """Learn how all processes ended, which were told to or killed: the interpreter waits for it at its own end.

        A fork server that does not tell is ended; a process that outlives SIGKILL, in a driver, is given up.
        """
        await self._reap(self._processes)
        self._processes = []

    async def _reap(self, processes: Sequence[BaseProcess]) -> None:
        if not await _have_ended(processes) and isinstance(self.context, ForkServerContext):
            kill_fork_server()
            await _have_ended(processes)
        for process in processes:
            if _may_live(process):
                logger.error("process %s of %s cannot be ended", process.pid, process.name)
                multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]

    async def _break_off(self, begun: Future[None], start: asyncio.Future[None], process: BaseProcess) -> None:
        """Abandon a start. Only the end of the fork server unblocks a thread that waits for its answer."""
        if begun.cancel():
            return
        await asyncio.wait({start}, timeout=_GRACE_S)
        if not start.done() and isinstance(self.context, ForkServerContext):
            kill_fork_server()
            await asyncio.wait({start}, timeout=_GRACE_S)
        if start.done() and not start.cancelled() and start.exception() is None:
            kill_process(process)
            await self._reap([process])


def _start_context(cards: Sequence[ModelCard]) -> ForkServerContext:
    """Fork from a server that has the libraries loaded (seconds and hundreds of MB cheaper).

    On GPUs too: loading them does not initialise CUDA, which a fork would not survive; workers look.
    """
    context = multiprocessing.get_context("forkserver")
    adapters = dict.fromkeys(family_of(card).adapter.partition(":")[0] for card in cards)
    context.set_forkserver_preload(
        ["tetriserve.worker.fork_server", "tetriserve.models.preload", *adapters, "tetriserve.worker.runner"]
    )
    return context


class _StartingThread(threading.Thread):
    """Runs what it is given, one after the other, until the process ends."""

    def __init__(self) -> None:
        super().__init__(name="tetriserve-starts", daemon=True)
        self._jobs: queue.SimpleQueue[tuple[Future[None], Callable[[], None]]] = queue.SimpleQueue()
        self.start()

    def submit(self, job: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        self._jobs.put((future, job))
        return future

    def run(self) -> None:
        while True:
            future, job = self._jobs.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                job()
            except BaseException as error:  # whoever waits for it is told
                future.set_exception(error)
            else:
                future.set_result(None)


@cache
def _starting_thread() -> _StartingThread:
    return _StartingThread()


_forked_by: int | None = None
"""The process id of the fork server of which a process was forked last."""


def _start(process: BaseProcess, pool: PoolConfig) -> None:
    global _forked_by
    _block_interrupts()
    with _lock, _environment(pool):
        process.start()
    _forked_by = _fork_server_pid()


def _has_forked() -> bool:
    return _forked_by is not None and _forked_by == _fork_server_pid()


def _fork_server_pid() -> int | None:
    pid: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


def kill_fork_server() -> None:
    """Workers live on as orphans; `keep_fork_server`, or the next start, sees to another."""
    with forkserver._forkserver._lock:  # type: ignore[attr-defined]  # it is not waited for meanwhile: the id is its own
        if (pid := _fork_server_pid()) is not None:
            os.kill(pid, signal.SIGKILL)


def _keep_fork_server(pool: PoolConfig) -> None:
    try:
        _block_interrupts()
        with _environment(pool):
            forkserver.ensure_running()
    except (OSError, RuntimeError, MemoryError) as error:  # none at the moment; it is tried again
        logger.error("the fork server cannot be started: %s", error)


def _block_interrupts() -> None:
    """Children begin with this thread's mask: Ctrl-C reaches a whole terminal, and the server decides what it means.

    multiprocessing unblocks it when it starts its resource tracker, which must be there before the fork server.
    """
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


@contextlib.contextmanager
def _environment(pool: PoolConfig) -> Iterator[None]:
    """Variables that libraries read when they load; they reach the workers, and the server's own are restored."""
    wanted = {
        "TETRISERVE_LOG_FORMAT": pool.log_format,  # for the fork server
        "OMP_NUM_THREADS": str(pool.num_threads),
        "OMP_WAIT_POLICY": "passive",  # spinning threads steal the cores that other ranks need: up to 14x slower
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",  # it would tell every worker that torchvision is missing
        "HF_HUB_OFFLINE": "1",
    }
    wanted |= {name: os.environ.get(name, value) for name, value in _DEFAULTS.items()}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


async def _have_ended(processes: Sequence[BaseProcess]) -> bool:
    """Whether all have, waited for no longer than the news may take."""
    deadline = time.monotonic() + _GRACE_S
    while any(map(_may_live, processes)):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


def _may_live(process: BaseProcess) -> bool:
    return process.exitcode is None


def kill_process(process: BaseProcess) -> None:
    """Kill a worker that was not seen to end: also an orphan, which multiprocessing would not."""
    if process.exitcode == _ORPHANED and process.pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    else:
        process.kill()


def wait_for_end(process: BaseProcess) -> str:
    """Wait until a dying worker has let go of what it held, its memory and its device; how it ended, in words.

    Blocks: call it in a thread.
    """
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while (left_s := deadline - time.monotonic()) > 0:
        # A start looks at all processes, and of two looks at once one would miss the exit code.
        if _lock.acquire(timeout=left_s):
            try:
                if process.exitcode is not None:
                    break
            finally:
                _lock.release()
        time.sleep(0.01)  # in a thread of its own, as the docstring asks
    return exit_words(process)


def exit_words(process: BaseProcess) -> str:
    process.join(0.05)  # the pipe closes a moment before the exit code is there
    code = process.exitcode
    if code is None or code == _ORPHANED:
        return ""
    return f" with signal {-code}" if code < 0 else f" with exit code {code}"
