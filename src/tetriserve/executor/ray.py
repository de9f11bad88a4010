"""Nodes of a Ray cluster: one agent actor on each, and the link to it. The only file that imports ray (extra `ray`).

Ray starts actors on nodes, carries messages, and knows which nodes there are. A node is lost when its heartbeats stop
or when Ray says so, whichever comes first.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any

try:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    from tetriserve.core.errors import ConfigError

    raise ConfigError("executor is ray, but ray is not installed; pip install 'tetriserve[ray]'") from error

from tetriserve.config import PoolConfig
from tetriserve.core.errors import ConfigError
from tetriserve.core.messages import StartFailed
from tetriserve.executor.link import HEARTBEAT_S, NodeLink
from tetriserve.executor.local import LocalExecutor
from tetriserve.executor.node import FromNode, NodeAgent, ToNode
from tetriserve.models.card import ModelCard

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
_STOP_TIMEOUT_S = 8.0
_CONNECT_TIMEOUT_S = 5.0


class RayAgent:
    """The actor: an agent, and the node's end of the channel. Batches are numbered from 0, and applied in order."""

    def __init__(self, name: str, cards: Sequence[ModelCard], pool: PoolConfig) -> None:
        self._name = name
        self._cards = tuple(cards)
        self._pool = pool
        self._agent: NodeAgent | None = None
        self._waiting: dict[int, tuple[ToNode, ...]] = {}
        self._next = 0
        self._told: list[FromNode] = []
        self._has_told = asyncio.Event()

    async def start(self) -> None:
        """Bring the ranks up; the messages say how it went."""
        missing = next((card.path for card in self._cards if not card.path.is_dir()), None)
        if missing is not None:
            self._tell(StartFailed(f"node {self._name} has no model directory {missing}; put it there"))
            return
        self._agent = NodeAgent(LocalExecutor(self._cards, self._pool), self._tell, HEARTBEAT_S)
        await self._agent.start()

    async def post(self, number: int, messages: tuple[ToNode, ...]) -> None:
        self._waiting[number] = messages
        while (batch := self._waiting.pop(self._next, None)) is not None:
            self._next += 1
            for message in batch:
                if self._agent is not None:  # else there is nothing yet that could be dropped
                    self._agent.take(message)

    async def poll(self) -> tuple[FromNode, ...]:
        """What was told since the last call, as soon as there is something."""
        await self._has_told.wait()
        self._has_told.clear()
        told, self._told = tuple(self._told), []
        return told

    async def stop(self) -> None:
        if self._agent is not None:
            await self._agent.stop()

    def _tell(self, message: FromNode) -> None:
        self._told.append(message)
        self._has_told.set()


class RayLink:
    """The way to the agent of the Ray node `node_id`. `delay_s` is added to messages each way, for tests."""

    def __init__(
        self, node_id: str, name: str, cards: Sequence[ModelCard], pool: PoolConfig, delay_s: float = 0.0
    ) -> None:
        self.name = name
        self.is_closed = False
        self._node_id = node_id
        self._cards = tuple(cards)
        self._pool = pool
        self._delay_s = delay_s
        self._outbox: list[ToNode] = []
        self._num_batches = 0
        self._jobs: set[asyncio.Task[None]] = set()
        self.closing: asyncio.Task[None] | None = None

    def open(self, on_message: Callable[[FromNode], None], on_lost: Callable[[str], None]) -> None:
        options: dict[str, Any] = {"num_gpus": self._pool.num_gpus} if self._pool.device == "cuda" else {}
        self._on_message, self.on_lost = on_message, on_lost
        self._actor: Any = (
            ray.remote(RayAgent)
            .options(
                num_cpus=0, max_restarts=0, max_concurrency=100,
                scheduling_strategy=NodeAffinitySchedulingStrategy(self._node_id, soft=False), **options,
            )
            .remote(self.name, self._cards, self._pool)
        )  # fmt: skip
        self._do(self._start())
        self._do(self._pump())

    def send(self, message: ToNode) -> None:
        if not self._outbox:
            loop = asyncio.get_running_loop()
            if self._delay_s:
                loop.call_later(self._delay_s, self._flush)
            else:
                loop.call_soon(self._flush)
        self._outbox.append(message)

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        for job in self._jobs:
            job.cancel()
        self.closing = asyncio.create_task(self._end())

    def _flush(self) -> None:
        """Send what was said in this turn of the loop as one batch."""
        messages, self._outbox = tuple(self._outbox), []
        if self.is_closed:
            return
        try:
            self._actor.post.remote(self._num_batches, messages)
        except Exception as error:  # what Ray raises is not documented; a batch that is missing holds all others up
            logger.error("node %s cannot be written to", self.name, exc_info=True)
            self.on_lost(f"it cannot be written to: {type(error).__name__}")
        self._num_batches += 1

    async def _start(self) -> None:
        await self._call(self._actor.start)

    async def _pump(self) -> None:
        while True:
            messages = await self._call(self._actor.poll)
            if messages is None:
                return
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            for message in messages:
                if not self.is_closed:
                    self._on_message(message)

    async def _call(self, method: Any) -> Any:
        """The answer of the actor, or None with `on_lost` told."""
        try:
            return await method.remote()
        except Exception as error:  # of Ray's, or the actor's own: it serves no more either way
            logger.info("the agent of node %s is gone: %s", self.name, error)
            self.on_lost(f"its agent is gone: {type(error).__name__}")
            return None

    async def _end(self) -> None:
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self._actor.stop.remote()
        except Exception as error:  # it is gone, or it does not answer
            logger.info("node %s was not stopped in order: %s", self.name, type(error).__name__)
        ray.kill(self._actor)

    def _do(self, job: Any) -> None:
        task = asyncio.create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)


class RayFleet:
    """The nodes of a Ray cluster that have room for the ranks of one: `pool.num_ranks` CPUs, or GPUs for them.

    address: of the cluster, as Ray takes it; `auto` is the one of this machine. delay_s: see `RayLink`.

    Raises:
        ConfigError: there is no cluster at the address, or no node with room.
    """

    def __init__(self, address: str, cards: Sequence[ModelCard], pool: PoolConfig, *, delay_s: float = 0.0) -> None:
        self._cards = tuple(cards)
        self._pool = pool
        self._delay_s = delay_s
        self._links: dict[str, RayLink] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._owns_connection = not ray.is_initialized()
        if self._owns_connection:
            _connect(address)
        self.num_nodes = len(self._with_room())
        if not self.num_nodes:
            what = f"{pool.num_gpus} GPUs" if pool.device == "cuda" else f"{pool.num_ranks} CPUs"
            raise ConfigError(f"no node of the Ray cluster has {what}, as its {pool.num_ranks} ranks need")

    async def start(self, on_node: Callable[[NodeLink], bool]) -> None:
        self._on_node = on_node
        self._offer(self._with_room())
        self._watch = asyncio.create_task(self._look())

    async def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        closing = [link.closing for link in self._links.values() if link.closing is not None]
        await asyncio.gather(*closing, *self._closing, return_exceptions=True)
        if self._owns_connection:
            await asyncio.to_thread(ray.shutdown)

    def _with_room(self) -> dict[str, str]:
        """Names of living nodes with room, by their id."""
        what, needed = ("GPU", self._pool.num_gpus) if self._pool.device == "cuda" else ("CPU", self._pool.num_ranks)
        return {
            node["NodeID"]: f"{node['NodeManagerAddress']}-{node['NodeID'][:6]}"
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get(what, 0) >= needed
        }

    def _offer(self, alive: dict[str, str]) -> None:
        """Have nodes that no agent runs on taken, by name, so that a start numbers them in the same way each time."""
        for node_id, name in sorted(alive.items(), key=lambda item: item[1]):
            if node_id not in self._links:
                link = RayLink(node_id, name, self._cards, self._pool, self._delay_s)
                if self._on_node(link):
                    self._links[node_id] = link

    async def _look(self) -> None:
        """Compare with Ray's table of nodes now and then: it confirms losses, and tells of nodes that join."""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                alive = await asyncio.to_thread(self._with_room)
            except Exception:  # the head of the cluster may be away for a while
                logger.warning("Ray does not say which nodes there are", exc_info=True)
                continue
            for node_id, link in list(self._links.items()):
                if node_id not in alive and not link.is_closed:
                    link.on_lost("Ray has taken it for dead")
                if link.closing is not None and (link.closing.done() or node_id not in alive):
                    del self._links[node_id]
                    self._closing = {task for task in (*self._closing, link.closing) if not task.done()}
            self._offer(alive)


def _connect(address: str) -> None:
    """Have Ray connect this process. It would try for minutes where nothing listens, so that is looked at first."""
    host, _, port = address.rpartition(":")
    try:
        if host and "/" not in host and port.isdecimal():
            socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"there is no Ray cluster at address {address!r}; start one with `ray start --head`"
        ) from error
