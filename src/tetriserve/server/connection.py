"""uvicorn's HTTP/1.1 by h11, which bounds headers, and bounds that it lacks: on how long a request takes to arrive, and
on open connections.

Without them whoever sends half a request and waits holds a connection, and its file descriptor, for ever.
"""

from __future__ import annotations

import asyncio
import resource

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tetriserve.server.errors import RESTART_S, ErrorResponse, envelope

ARRIVAL_S = 30.0
"""From a request's first byte to its last: a full body at 35 KB/s."""
_MAX_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
MAX_CONNECTIONS = 4096 if _MAX_FILES == resource.RLIM_INFINITY else min(4096, _MAX_FILES // 2)
"""What remains of the files that this process may open is for workers and images."""

_UNANSWERED = (h11.IDLE, h11.SEND_RESPONSE)


class BoundedProtocol(H11Protocol):
    """One connection. What the app never sees is answered in the envelope here, and closed."""

    _arrival: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            message = f"{MAX_CONNECTIONS} connections are open; no more are possible"
            self._refuse(envelope(503, message, "too_many_connections", retry_after_s=RESTART_S))
            return
        # One that sends nothing is as idle as one that was answered; uvicorn begins to count at the first answer.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._note_arrived()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

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
        if self.conn.our_state in _UNANSWERED and not self.transport.is_closing():
            headers = [*response.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=response.status_code, headers=headers),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
