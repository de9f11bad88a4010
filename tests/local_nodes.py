"""Nodes of a cluster within one process, with real workers: a link without a network, and a fleet of such links."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tetriserve.config import PoolConfig
from tetriserve.executor.link import HEARTBEAT_S, NodeLink
from tetriserve.executor.local import LocalExecutor
from tetriserve.executor.node import FromNode, NodeAgent, ToNode
from tetriserve.models.card import ModelCard


class LocalLink:
    """A node with an executor of its own; its messages take a turn of the loop each way."""

    def __init__(self, name: str, cards: Sequence[ModelCard], pool: PoolConfig) -> None:
        self.name = name
        self.executor = LocalExecutor(cards, pool)
        self.copies_are_held = False
        self._agent = NodeAgent(self.executor, self._tell, HEARTBEAT_S)
        self._is_cut = False
        self._ending: asyncio.Task[None] | None = None

    @property
    def store(self) -> Path:
        """Where the node's states lie."""
        return self.executor._directory.path

    def open(self, on_message: Callable[[FromNode], None], on_lost: Callable[[str], None]) -> None:
        self._on_message = on_message
        self._starting = asyncio.create_task(self._agent.start())

    def send(self, message: ToNode) -> None:
        if not self._is_cut:
            asyncio.get_running_loop().call_soon(self._agent.take, message)

    def _tell(self, message: FromNode) -> None:
        if not self._is_cut and not (self.copies_are_held and type(message).__name__ == "StateCopy"):
            asyncio.get_running_loop().call_soon(self._deliver, message)

    def _deliver(self, message: FromNode) -> None:
        if not self._is_cut:
            self._on_message(message)

    def kill(self) -> None:
        """Cut the node off and kill its workers, at once and without a word to the head."""
        self._is_cut = True
        for pid in self.executor.pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        self._is_cut = True
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        self._starting.cancel()
        await asyncio.gather(self._starting, return_exceptions=True)
        await self._agent.stop()

    async def ended(self) -> None:
        self.close()
        assert self._ending is not None
        await self._ending


class LocalFleet:
    """`num_nodes` nodes, and more when asked for them."""

    def __init__(self, num_nodes: int, cards: Sequence[ModelCard], pool: PoolConfig) -> None:
        self.links: list[LocalLink] = []
        self._num_nodes = num_nodes
        self._cards = cards
        self._pool = pool

    async def start(self, on_node: Callable[[NodeLink], bool]) -> None:
        self._on_node = on_node
        for _ in range(self._num_nodes):
            self.add()

    def add(self) -> LocalLink:
        link = LocalLink(f"local-{len(self.links)}", self._cards, self._pool)
        self.links.append(link)
        assert self._on_node(link)
        return link

    async def stop(self) -> None:
        await asyncio.gather(*(link.ended() for link in self.links))
