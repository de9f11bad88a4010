"""uvicorn's HTTP/1.1 by h11, which bounds headers, and bounds that it lacks: on how long a request takes to arrive, on
what of a body is read after the answer, and on open connections.

Without them whoever sends half a request and waits holds a connection, and its file descriptor, for ever.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tetriserve.server.errors import RESTART_S, ErrorResponse, envelope

ARRIVAL_S = 30.0
"""From a request's first byte to its last: a full body at 35 KB/s."""
MAX_UNWANTED_BYTES = 2**20
"""Of a body that was answered, by a refusal, before it had arrived: with more of it the connection is closed."""
MAX_CONNECTIONS = 4096
BACKLOG = 64
"""Connections accepted in one turn of the event loop: refused ones must be closed before the next are accepted."""

_MAX_FILES = 2**16
_ACCEPT_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_QUIET_S = 60.0
logger = logging.getLogger(__name__)

_UNANSWERED = (h11.IDLE, h11.SEND_RESPONSE)


def raise_file_limit() -> None:
    """Allow this process as many open files as it may allow itself: shells often grant 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def max_connections() -> int:
    """At most half of the files that this process may open; the others are for workers and images."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 2)


class LoopErrors:
    """The event loop's exception handler. That no connection can be accepted is one line a minute.

    asyncio stops accepting for a second then, and reports it once for each connection that waits.
    """

    def __init__(self) -> None:
        self._quiet_until = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _ACCEPT_ERRORS or "socket" not in context:
            loop.default_exception_handler(context)
        elif loop.time() >= self._quiet_until:
            self._quiet_until = loop.time() + _QUIET_S
            logger.error("connections wait to be accepted: %s; raise the limit (ulimit -n)", error.strerror)


class BoundedProtocol(H11Protocol):
    """One connection. What the app never sees is answered in the envelope here, and closed."""

    _arrival: asyncio.TimerHandle | None = None
    _num_unwanted_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        limit = max_connections()
        if len(self.connections) > limit:
            message = f"{limit} connections are open; no more are possible"
            self._refuse(envelope(503, message, "too_many_connections", retry_after_s=RESTART_S))
            return
        # One that sends nothing is as idle as one that was answered; uvicorn begins to count at the first answer.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._note_arrived()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY:
            self._num_unwanted_bytes += len(data)
            if self._num_unwanted_bytes > MAX_UNWANTED_BYTES:
                self.transport.close()
                return
        super().data_received(data)

    def on_response_complete(self) -> None:
        self._num_unwanted_bytes = 0
        super().on_response_complete()

    def handle_events(self) -> None:
        super().handle_events()
        state = self.conn.their_state
        if state is h11.SEND_BODY or (state is h11.IDLE and self.conn.trailing_data[0]):
            self._arrival = self._arrival or self.loop.call_later(ARRIVAL_S, self._give_up)
        else:
            self._note_arrived()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP/1.1, or more than 64 KiB of headers."""
        self._refuse(envelope(400, "this is no HTTP/1.1 request that can be read", "invalid_http"))

    def _note_arrived(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _give_up(self) -> None:
        self._refuse(envelope(408, f"the request did not arrive within {ARRIVAL_S:g} s", "request_timeout"))

    def _refuse(self, response: ErrorResponse) -> None:
        """Answer if nothing has been answered yet, and close."""
        if self.scope is not None:
            self.scope["state"]["refusal"] = response  # for the log and the metrics
        if self.conn.our_state in _UNANSWERED and not self.transport.is_closing():
            headers = [*response.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=response.status_code, headers=headers),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
