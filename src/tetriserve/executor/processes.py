"""How worker processes begin and end."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.context import BaseContext, ForkServerContext
from multiprocessing.process import BaseProcess

from tetriserve.config import PoolConfig

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 5.0
_ORPHANED = 255
"""What multiprocessing takes for the exit code of every process whose parent, the fork server, has died."""
_lock = threading.Lock()


def start_context(pool: PoolConfig) -> BaseContext:
    """Fork from a server that has the libraries loaded (seconds and hundreds of MB cheaper); CUDA demands a spawn."""
    if pool.device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    preloaded = ("worker.fork_server", "models.preload", "models.flux", "worker.runner")
    context.set_forkserver_preload([f"tetriserve.{name}" for name in preloaded])
    return context


def start_process(process: BaseProcess, pool: PoolConfig) -> None:
    """Start with the environment that workers need; one at a time, since the environment is the whole process's."""
    with _lock, _environment(pool):
        process.start()


def keep_fork_server(context: BaseContext, pool: PoolConfig) -> None:
    """Start the fork server again if it has died: it takes seconds, and the next replacement would wait for them."""
    if isinstance(context, ForkServerContext) and _lock.acquire(blocking=False):  # else it is at work just now
        try:
            with _environment(pool):
                forkserver.ensure_running()
        except OSError as error:  # no process or no memory at the moment; it is tried again
            logger.error("the fork server cannot be started: %s", error)
        finally:
            _lock.release()


@contextlib.contextmanager
def _environment(pool: PoolConfig) -> Iterator[None]:
    """Variables that libraries read when they load; they reach the workers, and the server's own are restored."""
    wanted = {
        "TETRISERVE_LOG_FORMAT": pool.log_format,  # for the fork server
        "OMP_NUM_THREADS": str(pool.num_threads),
        "OMP_WAIT_POLICY": "passive",  # spinning threads steal the cores that other ranks need: up to 14x slower
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",  # it would tell every worker that torchvision is missing
        # diffusers calls a collective by a name that torch is about to retire; the pinned pair works.
        "PYTHONWARNINGS": "ignore::FutureWarning:diffusers.hooks.context_parallel",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),  # ranks of this host meet on loopback
    }
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


def end_processes(processes: list[BaseProcess]) -> None:
    """Wait for workers to end, and end those that do not."""
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive() or process.exitcode == _ORPHANED:
            end_process(process)


def end_process(process: BaseProcess) -> None:
    """End a worker that nobody needs, at once; one that never started is no error."""
    if process.pid is not None:
        kill_process(process)
        process.join()


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
    while time.monotonic() < deadline:
        with _lock:  # a start looks at all processes, and of two looks at once one would miss the exit code
            if process.exitcode is not None:
                break
        time.sleep(0.01)  # in a thread of its own, as the docstring asks
    return exit_words(process)


def exit_words(process: BaseProcess) -> str:
    process.join(0.05)  # the pipe closes a moment before the exit code is there
    code = process.exitcode
    if code is None or code == _ORPHANED:
        return ""
    return f" with signal {-code}" if code < 0 else f" with exit code {code}"
