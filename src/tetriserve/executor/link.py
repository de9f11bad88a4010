"""What carries messages between the head of a cluster and its nodes, and what finds nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tetriserve.executor.node import FromNode, ToNode

HEARTBEAT_S = 0.2
"""Between two signs of life of a node."""

SILENCE_S = 3.0
"""A node without a sign of life for so long is taken for lost."""


class NodeLink(Protocol):
    """The way to one node's agent and back. Messages arrive in order, on the head's event loop, or not at all."""

    @property
    def name(self) -> str:
        """For the log."""
        ...

    def open(self, on_message: Callable[[FromNode], None], on_lost: Callable[[str], None]) -> None:
        """Start the agent, and tell of its messages. `on_lost`, with the reason, if it is known to be gone; a node that
        falls silent is noticed without."""
        ...

    def send(self, message: ToNode) -> None:
        """Never blocks, and never fails: what cannot be sent is lost with the node."""
        ...

    def close(self) -> None:
        """End the agent and its workers as far as they can be reached. Nothing is told after it."""
        ...


class Fleet(Protocol):
    """Finds nodes."""

    async def start(self, on_node: Callable[[NodeLink], bool]) -> None:
        """Tell of every node that is there, and from now on of those that come or return. The answer is whether it is
        taken; one that is not may be told of again.

        Raises:
            ConfigError: there are none to be had.
        """
        ...

    async def stop(self) -> None: ...
