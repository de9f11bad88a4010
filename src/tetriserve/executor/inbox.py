"""Receiving from a process that may be out of its mind: what it wrote is checked before anybody acts on it."""

from __future__ import annotations

import io
import os
import pickle  # noqa: TID251  # between our own processes, over a pipe that they inherit; and see `_Unpickler`
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, cast, get_args, get_origin, get_type_hints

from tetriserve.core.errors import TetriServeError
from tetriserve.core.events import FailureKind, Result, TensorRef, TextCount
from tetriserve.core.memory import Component, RankMemory
from tetriserve.core.messages import FromWorker, PreviewBasis

MAX_MESSAGE_BYTES = 2**20
_HEADER_BYTES = 4
_READ_BYTES = 2**16
_FIELDS: dict[type, dict[str, Any]] = {
    kind: get_type_hints(kind)
    for kind in (*get_args(FromWorker), Result, TensorRef, TextCount, RankMemory, Component, PreviewBasis)
}
_CLASSES = {(kind.__module__, kind.__name__): kind for kind in (*_FIELDS, FailureKind)}


class Garbled(TetriServeError):
    """A worker wrote what is no message; nothing after it can be read."""


class Inbox:
    """Messages from one worker, in order. Never blocks the event loop, however little of a message has come.

    `Connection.recv` would wait for the rest. The form is that of `Connection.send`: the length in four bytes, the most
    significant first, and a pickle.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._unread = bytearray()

    def read(self) -> Iterator[FromWorker]:
        """The messages that are complete now.

        Raises:
            EOFError, OSError: the worker is gone.
            Garbled: end it, and read no more.
        """
        while self._connection.poll():
            content = os.read(self._connection.fileno(), _READ_BYTES)
            if not content:
                raise EOFError
            self._unread += content
            while (end := self._end()) is not None:
                message = _message(bytes(self._unread[_HEADER_BYTES:end]))
                del self._unread[:end]
                yield message

    def _end(self) -> int | None:
        """Where the first message ends; None if it is not there yet."""
        if len(self._unread) < _HEADER_BYTES:
            return None
        num_bytes = int.from_bytes(self._unread[:_HEADER_BYTES], "big")
        if num_bytes > MAX_MESSAGE_BYTES:
            raise Garbled(f"its message claims {num_bytes} bytes, of at most {MAX_MESSAGE_BYTES}")
        end = _HEADER_BYTES + num_bytes
        return end if len(self._unread) >= end else None


def _message(content: bytes) -> FromWorker:
    """
    Raises:
        Garbled: not one of the messages, or a field is of another type.
    """
    try:
        message = _Unpickler(io.BytesIO(content)).load()
        if _fits(message, FromWorker):
            return cast(FromWorker, message)
    except Exception as error:  # unpickling raises whatever the bytes lead to
        raise Garbled(f"its message cannot be read: {type(error).__name__}: {error}") from None
    raise Garbled(f"its message is of the wrong type: {message!r:.100}")


class _Unpickler(pickle.Unpickler):
    """Makes messages and what they consist of, and nothing else: no function can be named, let alone called."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _CLASSES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a message") from None


def _fits(value: object, kind: Any) -> bool:
    """Whether `value` is of the type that a field was declared with, and so are its own fields."""
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(element, get_args(kind)[0]) for element in value)
    fields = _FIELDS.get(type(value), {}).items()
    return isinstance(value, kind) and all(_fits(getattr(value, name), declared) for name, declared in fields)
