"""Ranks as supervised processes on this machine, one per GPU or CPU slot.

A worker that dies is noticed by its lifeline, one that hangs by its missing heartbeats; either is replaced under the
same rank while the others keep their models. Requests survive through the copies in the tensor store.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from typing import assert_never

from tetriserve.config import PoolConfig
from tetriserve.core.errors import ConfigError
from tetriserve.core.events import Event, FailureKind, StartTask, TaskFailed, TensorRef, WorkerJoined, WorkerLost
from tetriserve.core.execution import DEFAULT
from tetriserve.core.memory import RankMemory, held_alike
from tetriserve.core.messages import (
    Forget,
    FromWorker,
    Heartbeat,
    Ready,
    RunTask,
    StartFailed,
    Stop,
    TaskDone,
    TaskError,
    ToWorker,
)
from tetriserve.executor.inbox import Garbled, Inbox
from tetriserve.executor.ledger import Ledger, Running
from tetriserve.executor.outbox import Outbox
from tetriserve.executor.processes import NoProcess, ProcessStarter, exit_words, kill_process, wait_for_end
from tetriserve.executor.protocol import OnEvent
from tetriserve.executor.worker import Worker
from tetriserve.models.card import ModelCard
from tetriserve.worker.main import worker_main
from tetriserve.worker.spec import WorkerSpec
from tetriserve.worker.store import StoreDirectory, TensorStore
from tetriserve.worker.team import SLOT_BYTES, Region

logger = logging.getLogger(__name__)

_MAX_RESTART_DELAY_S = 30.0
_STOP_TIMEOUT_S = 5.0
_KILL_TIMEOUT_S = 1.0
_FIRST_PATIENCE = 5.0
"""A fork server may take so many times as long for the first workers as for later ones: nobody waits for an image, and
a start that fails is for good."""


class LocalExecutor:
    """See `executor.protocol.Executor`. `cards` are of the models, each with a key of its own; `adapter` replaces their
    own adapters, for tests."""

    def __init__(self, cards: Sequence[ModelCard], pool: PoolConfig, *, adapter: str | None = None) -> None:
        self._cards = tuple(cards)
        # A step that compiles takes as long as a start may.
        compiles = any(card.execution.compile != DEFAULT for card in cards)
        step_timeout_s = max(pool.step_timeout_s, pool.start_timeout_s if compiles else 0.0)
        self._pool = pool = replace(pool, step_timeout_s=step_timeout_s)
        self._adapter = adapter
        self._workers: dict[int, Worker] = {}
        self._ledger = Ledger()
        self._num_tasks = 0
        self._num_failed_starts: dict[int, int] = dict.fromkeys(range(pool.num_ranks), 0)
        self._restarts: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._started: asyncio.Future[None] | None = None
        self._on_event: OnEvent = lambda event: None
        self._is_stopping = False
        self.num_restarts = 0
        self._starter = ProcessStarter(cards, pool)
        self._region = Region(pool.num_ranks, SLOT_BYTES if pool.collectives == "shm" else 0)
        self._directory = StoreDirectory()
        self.states = TensorStore(self._directory.path)
        self.preview_bases: Mapping[str, TensorRef] = {}

    @property
    def ranks(self) -> frozenset[int]:
        return frozenset(rank for rank, worker in self._workers.items() if worker.is_ready)

    @property
    def memory(self) -> Mapping[int, RankMemory]:
        return {rank: self._workers[rank].memory for rank in sorted(self.ranks)}

    @property
    def pids(self) -> dict[int, int]:
        """Process id of every rank's present worker."""
        return {rank: worker.process.pid or 0 for rank, worker in self._workers.items()}

    def subscribe(self, on_event: OnEvent) -> None:
        self._on_event = on_event

    async def start(self, on_progress: Callable[[str], None]) -> None:
        self._started = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._pool.start_timeout_s):
                on_progress(f"starting {self._pool.num_ranks} workers")
                for rank in range(self._pool.num_ranks):
                    await self._spawn(rank, patience=_FIRST_PATIENCE)
                on_progress("loading the model" if len(self._cards) == 1 else "loading the models")
                await self._started
                self._watch = asyncio.create_task(self._watch_heartbeats())
        except TimeoutError:
            await self.stop()
            raise ConfigError(
                f"workers were not ready within {self._pool.start_timeout_s:g} s; see the log, or raise --start-timeout"
            ) from None
        except (OSError, NoProcess) as error:
            await self.stop()
            raise ConfigError(f"workers cannot be started: {error}") from error
        except BaseException:
            await self.stop()
            raise
        finally:
            if not self._started.cancel() and not self._started.cancelled():
                self._started.exception()  # asked for, or asyncio would report it where another error came first

    def start_task(self, command: StartTask) -> None:
        self._num_tasks += 1
        running = self._ledger.open(command, self._num_tasks)
        for rank in reversed(command.task.ranks):  # the leader has the state more often than those that begin first
            worker = self._workers.get(rank)
            if worker is None:  # died between the plan and now
                running.lose(rank, f"rank {rank} is gone")
            else:
                worker.last_step_s = time.monotonic()
                self._send(rank, RunTask(command, running.token))
        if running.lost_reason is not None:
            self._hurry(running)
            asyncio.get_running_loop().call_soon(self._settle, running)

    def forget(self, request_id: str) -> None:
        self.states.drop_request(request_id)
        for rank in self._workers:
            self._send(rank, Forget(request_id))

    async def stop(self) -> None:
        """End all workers in bounded time. A second call, after the first was cancelled, kills them at once."""
        is_hurried, self._is_stopping = self._is_stopping, True
        tasks = [task for task in (self._watch, *self._restarts) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for rank in self._workers:
            self._send(rank, Stop())
        if not is_hurried:
            await self._are_gone(_STOP_TIMEOUT_S)
        for worker in self._workers.values():
            kill_process(worker.process)
        await self._are_gone(_KILL_TIMEOUT_S)
        for worker in self._workers.values():
            worker.unwatch()
        self._workers.clear()
        await self._starter.reap()
        self._directory.remove()
        self._region.close()

    async def _are_gone(self, timeout_s: float) -> None:
        """Wait until the lifelines of all workers have ended."""
        deadline = time.monotonic() + timeout_s
        while self._workers and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    async def _spawn(self, rank: int, *, patience: float = 1.0) -> None:
        ours, theirs = self._starter.context.Pipe()
        lifeline, held = self._starter.context.Pipe(duplex=False)
        spec = WorkerSpec(
            rank=rank, cards=self._cards, pool=self._pool, region=self._region, store=self._directory.path,
            adapter=self._adapter,
        )  # fmt: skip
        process = self._starter.context.Process(  # type: ignore[attr-defined]
            target=worker_main, args=(spec, theirs, held), name=f"tetriserve-rank-{rank}", daemon=True
        )
        try:
            await self._starter.start(process, patience=patience)
        except BaseException:
            ours.close()
            lifeline.close()
            raise
        finally:
            theirs.close()  # so that our ends read end-of-file when the worker dies
            held.close()
        now, loop = time.monotonic(), asyncio.get_running_loop()
        self._workers[rank] = Worker(process, ours, lifeline, Inbox(ours), Outbox(ours), born_s=now, last_sign_s=now)
        loop.add_reader(ours.fileno(), self._read, rank)
        loop.add_reader(lifeline.fileno(), self._read_last, rank)

    def _tell(self, event: Event) -> None:
        """Report `event`. An error of the subscriber is logged and does not cost the worker that the event is about."""
        try:
            self._on_event(event)
        except Exception as error:
            context = {"message": f"{type(event).__name__} could not be handled", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)

    def _read(self, rank: int) -> None:
        """Take in what a worker wrote; end-of-file is its death."""
        worker = self._workers[rank]
        messages = worker.inbox.read()
        while True:
            try:
                message = next(messages, None)
            except (EOFError, OSError):
                self._lose(rank, worker.verdict or "its process ended")
                return
            except Garbled as error:
                worker.kill(str(error))
                return
            if message is None:
                return
            try:
                self._take(rank, worker, message)
            except Exception as error:  # its task would never end otherwise
                logger.critical("a message of rank %d could not be handled", rank, exc_info=True)
                worker.kill(f"its message could not be handled: {type(error).__name__}")
                return

    def _read_last(self, rank: int) -> None:
        """A worker's lifeline has ended: it is dying, and what it wrote is all that it will have written."""
        worker = self._workers[rank]
        self._read(rank)
        if self._workers.get(rank) is worker:
            self._lose(rank, worker.verdict or "its process ended")

    def _take(self, rank: int, worker: Worker, message: FromWorker) -> None:
        worker.last_sign_s = time.monotonic()
        match message:
            case Heartbeat(num_steps):
                if num_steps != worker.num_steps:
                    worker.num_steps, worker.last_step_s = num_steps, worker.last_sign_s
            case TaskDone() | TaskError():
                self._answer(rank, message)
            case Ready(preview_bases, memory):
                worker.is_ready, worker.memory = True, memory
                self.preview_bases = {**self.preview_bases, **{basis.model: basis.ref for basis in preview_bases}}
                self._num_failed_starts[rank] = 0
                self._tell(WorkerJoined(rank))
                if self._started and not self._started.done() and len(self.ranks) == self._pool.num_ranks:
                    for held in held_alike(self.memory):
                        logger.info("%s", held)
                    self._started.set_result(None)
            case StartFailed(text):
                if self._started and not self._started.done():
                    self._started.set_exception(ConfigError(text))
                logger.error("rank %d cannot start: %s", rank, text)
            case _:
                assert_never(message)

    def _answer(self, rank: int, message: TaskDone | TaskError) -> None:
        running = self._ledger.find(message.task_id)
        if running is None:
            return
        running.answer(rank, message)
        if isinstance(message, TaskError):
            self._hurry(running)
            if message.kind is FailureKind.STORE:
                self._directory.restore()
            if message.kind is FailureKind.MEMORY:  # for good, maybe: it would fail whatever it is given next
                self._workers[rank].kill(f"ran out of memory: {message.message}")
        self._settle(running)

    def _settle(self, running: Running) -> None:
        """Once every member has answered or died, the task is over: say how it went."""
        end, start = self._ledger.close(running), running.start
        if end is None:
            return
        self._tell(end)  # before anything that may fail: the ledger has forgotten the task
        if not isinstance(end, TaskFailed):
            for work in start.work:
                if (replaced := work.states.get(start.task.stage)) is not None:
                    self.states.drop(replaced)

    def _lose(self, rank: int, reason: str) -> None:
        """A worker is gone: tell, free its peers, and replace it."""
        worker = self._workers.pop(rank)
        worker.unwatch()
        if self._is_stopping:
            return
        logger.error("lost rank %d: %s", rank, reason)
        if self._started and not self._started.done():
            self._started.set_exception(ConfigError(f"worker {rank} ended while starting{exit_words(worker.process)}"))
            return
        self._region.abort((rank,), self._num_tasks)
        if worker.is_ready:
            self._tell(WorkerLost(rank, reason))
        for running in self._ledger.waiting_for(rank):
            running.lose(rank, f"rank {rank} was lost: {reason}", is_victim=worker.verdict is not None)
            self._hurry(running)
            self._settle(running)
        restart = asyncio.create_task(self._restart(rank, worker.process))
        self._restarts.add(restart)
        restart.add_done_callback(self._restarts.discard)

    async def _restart(self, rank: int, last: BaseProcess) -> None:
        """Start a replacement for the `last` process, later and later if it keeps dying before it is ready."""
        try:
            how = await asyncio.to_thread(wait_for_end, last)
        except RuntimeError:  # no thread at the moment
            how = ""
        logger.info("the process of rank %d ended%s; another takes its place", rank, how)
        while True:
            num_failed = self._num_failed_starts[rank]
            self._num_failed_starts[rank] += 1
            await asyncio.sleep(restart_delay_s(num_failed))
            self.num_restarts += 1
            try:
                await self._spawn(rank)
            except (OSError, MemoryError, NoProcess) as error:  # OSError: no pipe
                logger.error("rank %d could not be started again: %s", rank, error)
            else:
                return

    def _hurry(self, running: Running) -> None:
        """Free the peers of a failed rank: they err at once. One that does not is stuck, and gets replaced.

        Every block has an exchange, so that a peer which merely computes comes to it before long.
        """
        self._region.abort(running.start.task.ranks, running.token)
        patience_s = min(self._pool.group_timeout_s, self._pool.heartbeat_timeout_s)
        asyncio.get_running_loop().call_later(patience_s, self._kill_pending, running, patience_s)

    def _kill_pending(self, running: Running, patience_s: float) -> None:
        if self._ledger.is_open(running):
            for rank in running.pending & self._workers.keys():
                self._workers[rank].kill(f"stuck after a peer failed, for {patience_s:g} s")

    async def _watch_heartbeats(self) -> None:
        every_s = self._pool.heartbeat_s
        looked_at = time.monotonic()
        while True:
            await asyncio.sleep(every_s)
            now = time.monotonic()
            away_s = now - looked_at - every_s  # this process was stopped itself, and its workers maybe with it
            looked_at = now
            if away_s > every_s:
                for worker in self._workers.values():
                    worker.shift(away_s)
            try:
                self._look(now)
            except Exception:  # this task must go on: nothing else notices hung workers
                logger.critical("a look at the workers failed", exc_info=True)

    def _look(self, now: float) -> None:
        busy = self._ledger.busy_ranks
        for rank, worker in list(self._workers.items()):
            if worker.verdict is not None:
                self._lose(rank, worker.verdict)  # killed a look ago, and its pipe is still open: stuck in a driver
            elif complaint := worker.complaint(self._pool, now, is_busy=rank in busy):
                worker.kill(complaint)
        self._starter.keep_fork_server()
        self._directory.restore()

    def _send(self, rank: int, message: ToWorker) -> None:
        worker = self._workers.get(rank)
        if worker is not None:
            worker.outbox.send(message)


def restart_delay_s(num_failed: int) -> float:
    """How long to wait before the next start, after so many that failed in a row."""
    return min(2.0 ** min(num_failed, 10), _MAX_RESTART_DELAY_S) if num_failed else 0.0
