"""HTTP/1.1 exchanges over kept-alive connections, at a small part of what a general client costs.

A load generator shares the machine with what it measures, and a busy loop sends late: httpx alone would take more of a
core at 200 requests per second than the whole bench may (`benchmarks/bench_overhead.py --clients`). Parsing is
httptools', Node's llhttp. What a general client adds (redirects, cookies, proxies, decompression) nobody wants here.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import cast

import httptools

from tetriserve.bench.address import Address
from tetriserve.core.errors import TetriServeError

_IDLE_S = 4.0
"""A connection idle for longer is not used again: uvicorn's default is to close it after 5 s."""
_FRAMING = (b"content-length", b"transfer-encoding")


class Unanswered(TetriServeError):
    """An exchange ended without a complete answer.

    Attributes:
        kind: `refused`, `network`, `closed`, `timeout` or `bad_answer`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer. `received_s` is when its last byte came, by the event loop's clock."""

    status: int
    body: bytes
    received_s: float


class Connections:
    """As many connections to one server as exchanges go on at once, each kept for the next."""

    def __init__(self, address: Address, api_key: str | None) -> None:
        self._address = address
        self._tls = ssl.create_default_context() if address.is_tls else None
        self._idle: list[_Connection] = []
        lines = [
            f"Host: {str(address).split('/')[2]}",
            "User-Agent: tetriserve-bench",
            "Accept: application/json",
            "Content-Type: application/json",
        ]
        if api_key:
            lines.append(f"Authorization: Bearer {api_key}")
        self._headers = "\r\n".join(lines)

    async def exchange(self, method: str, path: str, body: bytes = b"", *, timeout_s: float) -> Answer:
        """Send one request and wait for the whole answer, at most `timeout_s`. Cancelling it closes the connection.

        Raises:
            Unanswered: no complete answer came.
        """
        head = f"{method} {self._address.path}{path} HTTP/1.1\r\n{self._headers}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(timeout_s):
                connection = self._take_idle() or await self._open()
                answer = await connection.ask(head.encode("ascii") + body)
        except TimeoutError:
            raise Unanswered("timeout", f"no answer within {timeout_s:g} s") from None
        finally:
            if connection is not None and not connection.is_reusable:
                connection.close()
        if connection.is_reusable:
            connection.idle_since_s = answer.received_s
            self._idle.append(connection)
        return answer

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _take_idle(self) -> _Connection | None:
        """The connection used last; those closed or idle for too long are dropped on the way."""
        oldest_s = asyncio.get_running_loop().time() - _IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable and connection.idle_since_s >= oldest_s:
                return connection
            connection.close()
        return None

    async def _open(self) -> _Connection:
        address = self._address
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                _Connection, address.host, address.port, ssl=self._tls
            )
        except TimeoutError:
            raise Unanswered("network", f"cannot reach {address}: the network gave up") from None
        except ConnectionRefusedError:
            raise Unanswered("refused", f"nothing listens at {address}") from None
        except (OSError, UnicodeError) as error:  # no such host, no route, no certificate; no name at all
            reason = getattr(error, "strerror", None) or error
            raise Unanswered("network", f"cannot reach {address}: {reason}") from None
        return connection


class _Connection(asyncio.Protocol):
    """One exchange at a time. httptools calls the `on_...` methods that it finds here."""

    def __init__(self) -> None:
        self.is_reusable = True
        self.idle_since_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[Answer] | None = None
        self._chunks: list[bytes] = []

    def ask(self, request: bytes) -> asyncio.Future[Answer]:
        self.is_reusable = False  # until the answer is complete
        self._chunks = []
        self._is_framed = False
        self._answer = self._loop.create_future()
        if self._transport.is_closing():
            self._fail("closed", "the server closed the connection before the request was sent")
        else:
            self._transport.write(request)
        return self._answer

    def close(self) -> None:
        self.is_reusable = False
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.close()  # nobody asked
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail("bad_answer", f"not an HTTP answer: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.is_reusable = False
        if self._answer is None or self._answer.done():
            return
        if self._chunks and error is None and not self._is_framed:
            self._finish()  # an answer of unstated length ends with its connection
        else:
            self._fail("closed", "the server closed the connection before its answer was complete")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._is_framed = self._is_framed or name.lower() in _FRAMING

    def on_body(self, chunk: bytes) -> None:
        self._chunks.append(chunk)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:  # 1xx: the answer is still to come
            return
        self.is_reusable = self._parser.should_keep_alive()
        self._finish()

    def _finish(self) -> None:
        assert self._answer is not None
        if not self._answer.done():
            body = b"".join(self._chunks)
            self._answer.set_result(Answer(self._parser.get_status_code(), body, self._loop.time()))

    def _fail(self, kind: str, message: str) -> None:
        assert self._answer is not None
        if not self._answer.done():
            self._answer.set_exception(Unanswered(kind, message))
