"""A node of a cluster: the agent that runs the ranks of one machine for a controller elsewhere, and what they say.

Ranks are numbered within the node. Messages are plain values, in the order in which they were sent; the bytes of states
go with them where states change their node.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import assert_never

from tetriserve.core.errors import ConfigError
from tetriserve.core.events import (
    Event,
    FailureKind,
    StartTask,
    TaskFailed,
    TaskFinished,
    TensorRef,
    WorkerJoined,
    WorkerLost,
)
from tetriserve.core.memory import RankMemory
from tetriserve.core.messages import Forget, Heartbeat, StartFailed
from tetriserve.executor.local import LocalExecutor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parcel:
    """A state on its way."""

    key: str
    data: bytes

    @property
    def ref(self) -> TensorRef:
        return TensorRef(self.key, len(self.data))


@dataclass(frozen=True, slots=True)
class RunOnNode:
    """Run a task, on ranks of the node. `states` are those that the node lacks."""

    start: StartTask
    states: tuple[Parcel, ...] = ()


@dataclass(frozen=True, slots=True)
class Fetch:
    """Send a state of the node's store, as the answer to question `number`."""

    number: int
    key: str


@dataclass(frozen=True, slots=True)
class CopyTaken:
    """The head has seen to the last copy of this request; it takes the next."""

    request_id: str


ToNode = RunOnNode | Forget | Fetch | CopyTaken


@dataclass(frozen=True, slots=True)
class NodeReady:
    """All ranks of the node are up. `bases` are their matrices of `models.preview`, by key of the model."""

    bases: tuple[tuple[str, Parcel], ...]


@dataclass(frozen=True, slots=True)
class RankJoined:
    rank: int
    memory: RankMemory


@dataclass(frozen=True, slots=True)
class RankLost:
    rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class TaskEnded:
    """Its ranks are idle again, but for those that were lost."""

    end: TaskFinished | TaskFailed


@dataclass(frozen=True, slots=True)
class StateCopy:
    """A copy of what a task left. It comes before the task's end where that is what the client waits for."""

    request_id: str
    state: Parcel


@dataclass(frozen=True, slots=True)
class Fetched:
    """`data` is None where the node has the state no longer."""

    number: int
    data: bytes | None


FromNode = Heartbeat | NodeReady | StartFailed | RankJoined | RankLost | TaskEnded | StateCopy | Fetched


class NodeAgent:
    """Runs `executor` for a controller elsewhere, on one event loop; `send` takes the node's messages, in order.

    heartbeat_s: how often the agent gives a sign of life.
    """

    def __init__(self, executor: LocalExecutor, send: Callable[[FromNode], None], heartbeat_s: float) -> None:
        self._executor = executor
        self._send = send
        self._heartbeat_s = heartbeat_s
        self._beating: asyncio.Task[None] | None = None
        self._jobs: set[asyncio.Task[None]] = set()
        self._starts: dict[int, StartTask] = {}
        self._to_copy: dict[str, dict[str, TensorRef]] = {}
        self._copying: set[str] = set()
        executor.subscribe(self._on_event)

    async def start(self) -> None:
        """Bring the ranks up; the head hears how it went."""
        self._beating = asyncio.create_task(self._beat())
        try:
            await self._executor.start(lambda text: logger.info("%s", text))
        except ConfigError as error:
            self._send(StartFailed(str(error)))
            return
        states = self._executor.states
        bases = [(key, Parcel(ref.key, states.get(ref))) for key, ref in self._executor.preview_bases.items()]
        self._send(NodeReady(tuple(bases)))

    def take(self, message: ToNode) -> None:
        """Take in a message of the head; none blocks."""
        match message:
            case RunOnNode(start, states):
                self._run(start, states)
            case Forget(request_id):
                self._to_copy.pop(request_id, None)
                self._copying.discard(request_id)
                self._executor.forget(request_id)
            case Fetch(number, key):
                self._do(self._answer(number, key))
            case CopyTaken(request_id):
                self._copying.discard(request_id)
                self._copy_next(request_id)
            case _:
                assert_never(message)

    async def stop(self) -> None:
        jobs = [job for job in (self._beating, *self._jobs) if job is not None]
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        await self._executor.stop()

    def _run(self, start: StartTask, states: tuple[Parcel, ...]) -> None:
        try:
            for state in states:
                self._executor.states.put(state.key, state.data)
        except OSError as error:
            failure = TaskFailed(start.task_id, FailureKind.STORE, f"a state could not be kept: {error.strerror}")
            self._send(TaskEnded(failure))
            return
        self._starts[start.task_id] = start
        self._executor.start_task(start)

    def _on_event(self, event: Event) -> None:
        match event:
            case WorkerJoined(rank):
                self._send(RankJoined(rank, self._executor.memory[rank]))
            case WorkerLost(rank, reason):
                self._send(RankLost(rank, reason))
            case TaskFinished():
                self._finish(event)
            case TaskFailed():
                self._starts.pop(event.task_id)
                self._send(TaskEnded(event))
            case _:
                raise AssertionError(f"an executor told {type(event).__name__}")

    def _finish(self, event: TaskFinished) -> None:
        """What clients wait for goes before the event; copies of other states follow, off the task's way."""
        start = self._starts.pop(event.task_id)
        outputs = set()
        for work, result in zip(start.work, event.results, strict=True):
            if work.trajectory.after(result.num_steps, is_stage_over=result.is_stage_over).is_over:
                request_id = work.request.request_id
                outputs.add(request_id)
                with contextlib.suppress(OSError):  # somebody has removed it: the head will not find it either
                    self._send(StateCopy(request_id, Parcel(result.left.key, self._executor.states.get(result.left))))
        self._send(TaskEnded(event))
        for work, result in zip(start.work, event.results, strict=True):
            if (request_id := work.request.request_id) not in outputs:
                self._to_copy.setdefault(request_id, {})[start.task.stage] = result.left
                self._copy_next(request_id)

    def _copy_next(self, request_id: str) -> None:
        """Send the newest state of a stage, if no copy of the request is on its way."""
        if request_id in self._copying or not (waiting := self._to_copy.get(request_id)):
            return
        ref = waiting.pop(next(iter(waiting)))
        if not waiting:
            del self._to_copy[request_id]
        self._copying.add(request_id)
        self._do(self._copy(request_id, ref))

    async def _copy(self, request_id: str, ref: TensorRef) -> None:
        try:
            data = await asyncio.to_thread(self._executor.states.get, ref)
        except OSError:  # a newer one has taken its place, or the request has ended
            self._copying.discard(request_id)
            self._copy_next(request_id)
        else:
            self._send(StateCopy(request_id, Parcel(ref.key, data)))

    async def _answer(self, number: int, key: str) -> None:
        try:
            data = await asyncio.to_thread(self._executor.states.get, TensorRef(key, 0))
        except OSError:
            data = None
        self._send(Fetched(number, data))

    async def _beat(self) -> None:
        while True:
            self._send(Heartbeat(0))
            await asyncio.sleep(self._heartbeat_s)

    def _do(self, job: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)
