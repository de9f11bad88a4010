"""Where the state of requests lies between tasks, whatever carries it: the protocol that engine and journal know."""

from __future__ import annotations

from typing import Protocol

from tetriserve.core.events import TensorRef


class StoreError(OSError):
    """There is no room in the store, or what it held of a request has been removed."""


class StateGone(StoreError):
    """What a reference names is not in the store any more: a newer result took its place, or its request has ended."""


class StateStore(Protocol):
    """Bundles of tensors by name, as bytes. They are there whole or not at all. Any thread may call it, and may wait.

    Keys begin with the request's id and a dot.
    """

    def put(self, key: str, data: bytes) -> TensorRef:
        """Keep `data` under `key`, in place of what was there: tasks can start from it.

        Raises:
            OSError: there is no room for it.
        """
        ...

    def get(self, ref: TensorRef) -> bytes:
        """What `put` was given, or what a task left.

        Raises:
            StateGone: it is there no longer.
            OSError: it cannot be read.
        """
        ...

    def drop(self, ref: TensorRef) -> None:
        """Nothing happens where it is gone already."""
        ...

    def copy(self, ref: TensorRef, key: str) -> TensorRef:
        """The same content under `key` too, which outlives the original.

        Raises:
            StateGone: it is there no longer.
            OSError: there is no room for it.
        """
        ...

    def list(self, request_id: str) -> tuple[TensorRef, ...]:
        """What is there of a request, by key."""
        ...
