"""Ranks on several nodes, each looked after by an agent on its machine (`executor.node`).

The head knows which rank is on which node, which task runs where, and where the states of requests are. The head gets
a copy of each request's newest state after the task has ended. A lost node costs its requests the task that runs, and
the tasks before it whose states were not copied yet.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import assert_never

from tetriserve.config import PoolConfig
from tetriserve.core.cluster import Nodes
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
from tetriserve.core.states import StateGone
from tetriserve.executor.copies import HEAD, Copies
from tetriserve.executor.link import HEARTBEAT_S, SILENCE_S, Fleet, NodeLink
from tetriserve.executor.node import (
    CopyTaken,
    Fetch,
    Fetched,
    FromNode,
    NodeReady,
    Parcel,
    RankJoined,
    RankLost,
    RunOnNode,
    StateCopy,
    TaskEnded,
)
from tetriserve.executor.protocol import OnEvent
from tetriserve.worker.store import StoreDirectory, TensorStore

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Node:
    """A node in its slot. ranks: those that are up, by their number on the node."""

    slot: int
    link: NodeLink
    last_sign_s: float
    has_spoken: bool = False
    ranks: dict[int, RankMemory] = field(default_factory=dict)
    is_ready: bool = False
    is_lost: bool = False


class ClusterExecutor:
    """See `executor.protocol.Executor`. `pool` has the ranks of all nodes, which have `ranks_per_node` each.

    silence_s: a node that gives no sign of life for so long, after its first, is taken for lost. Agents give one every
        `HEARTBEAT_S`.
    """

    def __init__(self, fleet: Fleet, pool: PoolConfig, ranks_per_node: int, *, silence_s: float = SILENCE_S) -> None:
        if pool.num_ranks % ranks_per_node:
            raise ConfigError(f"ranks is {pool.num_ranks}, with {ranks_per_node} on each node; use a multiple of that")
        self._fleet = fleet
        self._pool = pool
        self._nodes = Nodes(ranks_per_node)
        self._ranks_per_node = ranks_per_node
        self._num_slots = pool.num_ranks // ranks_per_node
        self._silence_s = silence_s
        self._slots: dict[int, _Node] = {}
        self._running: dict[int, StartTask] = {}
        self._copies = Copies()
        self._bringing: set[asyncio.Task[None]] = set()
        self._questions: dict[int, tuple[_Node, asyncio.Future[bytes]]] = {}
        self._numbers = itertools.count()
        self._started: asyncio.Future[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._on_event: OnEvent = lambda event: None
        self._is_stopping = False
        self._directory = StoreDirectory()
        self._store = TensorStore(self._directory.path)
        self.states = ClusterStates(self._store, self)
        self.preview_bases: Mapping[str, TensorRef] = {}

    @property
    def ranks(self) -> frozenset[int]:
        return frozenset(self.memory)

    @property
    def memory(self) -> Mapping[int, RankMemory]:
        return {
            self._rank(node, rank): memory
            for _, node in sorted(self._slots.items())
            for rank, memory in sorted(node.ranks.items())
        }

    def subscribe(self, on_event: OnEvent) -> None:
        self._on_event = on_event

    async def start(self, on_progress: Callable[[str], None]) -> None:
        self.states.loop = asyncio.get_running_loop()
        self._started = self.states.loop.create_future()
        try:
            async with asyncio.timeout(self._pool.start_timeout_s):
                on_progress(f"starting {self._num_slots} nodes of {self._ranks_per_node} ranks")
                await self._fleet.start(self.join)
                self._watch = asyncio.create_task(self._watch_signs())
                await self._started
        except TimeoutError:
            num_ready = sum(node.is_ready for node in self._slots.values())
            await self.stop()
            raise ConfigError(
                f"{num_ready} of {self._num_slots} nodes were ready within {self._pool.start_timeout_s:g} s; see the "
                "log, or raise --start-timeout"
            ) from None
        except BaseException:
            await self.stop()
            raise
        finally:
            if not self._started.cancel() and not self._started.cancelled():
                self._started.exception()  # asked for, or asyncio would report it where another error came first

    def join(self, link: NodeLink) -> bool:
        """A node is there. It takes the lowest slot that is free; where none is, it is left alone."""
        slot = next((slot for slot in range(self._num_slots) if slot not in self._slots), None)
        if slot is None or self._is_stopping:
            logger.debug("node %s is not needed: there are %d already", link.name, self._num_slots)
            return False
        node = self._slots[slot] = _Node(slot, link, time.monotonic())
        logger.info("node %s is number %d", link.name, slot)
        link.open(lambda message: self._hear(node, message), lambda reason: self._lose(node, reason))
        return True

    def start_task(self, command: StartTask) -> None:
        """See `executor.protocol.Executor`.

        Raises:
            ValueError: its ranks are not all on one node.
        """
        ranks = command.task.ranks
        if not self._nodes.share(ranks):
            raise ValueError(f"ranks {ranks} are on several nodes of {self._ranks_per_node}; a task needs one node")
        for work in command.work:
            self._copies.start(work)
        self._running[command.task_id] = command
        node = self._slots.get(self._nodes.of(ranks[0]))
        if node is None:  # lost between the plan and now
            gone = TaskFailed(command.task_id, FailureKind.LOST, "its node is gone")
            asyncio.get_running_loop().call_soon(self._end, gone)
            return
        task = replace(command.task, ranks=tuple(rank - node.slot * self._ranks_per_node for rank in ranks))
        local = replace(command, task=task)
        missing = [
            (work.request.request_id, ref.key)
            for work in command.work
            for ref in work.states.values()
            if node.slot not in self._copies.places(work.request.request_id, ref.key)
        ]
        if not missing:
            node.link.send(RunOnNode(local))
            return
        bringing = asyncio.create_task(self._bring(local, node, missing))
        self._bringing.add(bringing)
        bringing.add_done_callback(self._bringing.discard)

    def forget(self, request_id: str) -> None:
        self._copies.forget(request_id)
        self._store.drop_request(request_id)
        for node in self._slots.values():
            node.link.send(Forget(request_id))

    async def stop(self) -> None:
        self._is_stopping = True
        tasks = [task for task in (self._watch, *self._bringing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for node in self._slots.values():
            node.is_lost = True
            node.link.close()
            self._end_questions(node)
        self._slots.clear()
        await self._fleet.stop()
        self._directory.remove()

    async def read(self, key: str) -> bytes:
        """A state, from the head's store or from a node that has it.

        Raises:
            StateGone: it is nowhere.
        """
        request_id = key.partition(".")[0]
        while True:
            places = self._copies.places(request_id, key)
            if HEAD in places:
                try:
                    return await asyncio.to_thread(self._store.get, TensorRef(key, 0))
                except StateGone:
                    if HEAD in self._copies.places(request_id, key):
                        raise
                    continue  # a newer one took its place meanwhile
            node = next((self._slots[place] for place in sorted(places) if place in self._slots), None)
            if node is None:
                raise StateGone(None, "a state is gone with its node")
            number = next(self._numbers)
            answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            self._questions[number] = (node, answer)
            node.link.send(Fetch(number, key))
            try:
                return await answer
            except ConnectionError:
                continue  # the node is gone, and known to be
            finally:
                self._questions.pop(number, None)

    async def _bring(self, local: StartTask, node: _Node, missing: list[tuple[str, str]]) -> None:
        """Start a task on a node that lacks states of it, once they are here."""
        try:
            parcels = tuple([Parcel(key, await self.read(key)) for _, key in missing])
        except OSError as error:
            self._end(TaskFailed(local.task_id, FailureKind.LOST, f"{error.strerror}"))
            return
        if node.is_lost:
            return  # the task has ended with it
        for request_id, key in missing:
            if request_id in self._copies:
                self._copies.arrive(request_id, key, node.slot)
        node.link.send(RunOnNode(local, parcels))

    def _hear(self, node: _Node, message: FromNode) -> None:
        if node.is_lost:
            return
        node.last_sign_s, node.has_spoken = time.monotonic(), True
        match message:
            case Heartbeat():
                pass
            case NodeReady(bases):
                node.is_ready = True
                for _, state in bases:
                    self._store.put(state.key, state.data)
                self.preview_bases = {**self.preview_bases, **{model: state.ref for model, state in bases}}
                if sum(each.is_ready for each in self._slots.values()) == self._num_slots:
                    self._end_start(None)
            case StartFailed(text):
                logger.error("node %s cannot start: %s", node.link.name, text)
                self._end_start(ConfigError(text))
                self._lose(node, text)
            case RankJoined(rank, memory):
                node.ranks[rank] = memory
                self._tell(WorkerJoined(self._rank(node, rank)))
            case RankLost(rank, reason):
                node.ranks.pop(rank, None)
                self._tell(WorkerLost(self._rank(node, rank), reason))
            case TaskEnded(end):
                self._end(end)
            case StateCopy(request_id, state):
                self._keep(request_id, state)
                node.link.send(CopyTaken(request_id))
            case Fetched(number, data):
                self._answer(number, data)
            case _:
                assert_never(message)

    def _end_start(self, error: ConfigError | None) -> None:
        if self._started is None or self._started.done():
            return
        if error is None:
            self._started.set_result(None)
        else:
            self._started.set_exception(error)

    def _keep(self, request_id: str, state: Parcel) -> None:
        if request_id not in self._copies:
            return  # it has ended
        try:
            self._store.put(state.key, state.data)
        except OSError as error:  # it goes on without a copy of this one
            logger.error("a copy of request %s could not be kept: %s", request_id, error)
            return
        for ref in self._copies.arrive(request_id, state.key, HEAD):
            self._store.drop(ref)

    def _answer(self, number: int, data: bytes | None) -> None:
        _, answer = self._questions.get(number, (None, None))
        if answer is None or answer.done():
            return
        if data is None:
            answer.set_exception(StateGone(None, "a state is no longer on its node"))
        else:
            answer.set_result(data)

    def _end(self, end: TaskFinished | TaskFailed) -> None:
        """Tell of a task's end, once."""
        command = self._running.pop(end.task_id, None)
        if command is None:
            return
        if isinstance(end, TaskFinished):
            slot = self._nodes.of(command.task.ranks[0])
            for work, result in zip(command.work, end.results, strict=True):
                self._copies.finish(work, command.task.stage, result, slot)
        self._tell(end)

    def _lose(self, node: _Node, reason: str) -> None:
        """Remove a lost node. Report its ranks as lost, then the states that have no other copy, then its tasks."""
        if node.is_lost:
            return
        node.is_lost = True
        del self._slots[node.slot]
        node.link.close()
        if self._is_stopping:
            return
        logger.error("lost node %s: %s", node.link.name, reason)
        self._end_start(ConfigError(f"node {node.link.name} was lost while starting: {reason}"))
        back = self._copies.lose(node.slot)
        tasks = [id for id, start in self._running.items() if self._nodes.of(start.task.ranks[0]) == node.slot]
        for rank in sorted(node.ranks):
            self._tell(WorkerLost(self._rank(node, rank), f"its node was lost: {reason}"))
        for lost in back:
            self._tell(lost)
        for task_id in tasks:
            self._end(TaskFailed(task_id, FailureKind.LOST, f"node {node.link.name} was lost: {reason}"))
        self._end_questions(node)

    def _end_questions(self, node: _Node) -> None:
        for asked, answer in list(self._questions.values()):
            if asked is node and not answer.done():
                answer.set_exception(ConnectionError("the node was lost"))

    def _tell(self, event: Event) -> None:
        """Report `event`. An error of the subscriber is logged, and costs no node."""
        try:
            self._on_event(event)
        except Exception as error:
            context = {"message": f"{type(event).__name__} could not be handled", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)

    async def _watch_signs(self) -> None:
        looked_at = time.monotonic()
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            now = time.monotonic()
            away_s = now - looked_at - HEARTBEAT_S  # this loop was held up itself: what came meanwhile waits to be read
            looked_at = now
            for node in list(self._slots.values()):
                if away_s > HEARTBEAT_S:
                    node.last_sign_s += away_s
                # Its agent may take long to start: a process that imports what it needs.
                patience_s = self._silence_s if node.has_spoken else self._pool.start_timeout_s
                if now - node.last_sign_s > patience_s:
                    self._lose(node, f"silent for {now - node.last_sign_s:.1f} s")
            self._directory.restore()

    def _rank(self, node: _Node, rank: int) -> int:
        return node.slot * self._ranks_per_node + rank


class ClusterStates:
    """The states of all nodes as one `core.states.StateStore`: at the head, or fetched from where they are.

    `loop` is the executor's, on which nothing here may be called that waits.
    """

    def __init__(self, store: TensorStore, executor: ClusterExecutor) -> None:
        self._store = store
        self._executor = executor
        self.loop: asyncio.AbstractEventLoop | None = None

    def put(self, key: str, data: bytes) -> TensorRef:
        return self._store.put(key, data)

    def get(self, ref: TensorRef) -> bytes:
        try:
            return self._store.get(ref)
        except StateGone:
            if self.loop is None:
                raise
            return asyncio.run_coroutine_threadsafe(self._executor.read(ref.key), self.loop).result()

    def drop(self, ref: TensorRef) -> None:
        self._store.drop(ref)

    def copy(self, ref: TensorRef, key: str) -> TensorRef:
        try:
            return self._store.copy(ref, key)
        except StateGone:
            return self._store.put(key, self.get(ref))

    def list(self, request_id: str) -> tuple[TensorRef, ...]:
        return self._store.list(request_id)
