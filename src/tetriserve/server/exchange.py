"""What happens around every HTTP exchange: a request id, a limit on the body, one line in the log, a last resort."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tetriserve.logs import MAX_FIELD_CHARS, fields
from tetriserve.server.errors import ErrorResponse, envelope
from tetriserve.server.links import shown_path
from tetriserve.server.metrics import Metrics
from tetriserve.server.uploads import Upload, Uploads
from tetriserve.workload.outcome import Outcome

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""Status in the log and the metrics when the client went away; nobody receives it."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_CLIENT_ID = re.compile(r"[ -~]{1,128}")


@dataclass
class Exchange:
    """Known of one exchange while it lasts, as `request.state.exchange`; handlers add what they learn.

    upload: the body, as long as it is in memory.
    facts: what the log line says beyond method, path, status and time.
    error_code: the code of the error it was answered with.
    is_cut_off: the connection ended before the body had arrived; the app's answer is sent to no client.
    """

    request_id: str
    upload: Upload
    facts: dict[str, object] = field(default_factory=dict)
    status: int | None = None
    error_code: str | None = None
    is_cut_off: bool = False

    def cut_off(self, refusal: ErrorResponse | None) -> None:
        """Note that the connection ended in the middle of the body: by `refusal`, or by the client."""
        self.status = CLIENT_CLOSED_REQUEST if refusal is None else refusal.status_code
        if refusal is not None:
            self.note_error(refusal)
        self.is_cut_off = True

    def note_error(self, response: ErrorResponse) -> None:
        if self.is_cut_off:
            return
        self.error_code = response.code
        self.facts |= response.facts

    def note_outcomes(self, outcomes: Sequence[Outcome]) -> None:
        """What became of the images of one call."""
        self.facts["latency_s"] = round(max(outcome.latency_s for outcome in outcomes), 3)
        self.facts["attained"] = f"{sum(outcome.is_attained for outcome in outcomes)}/{len(outcomes)}"


class ExchangeMiddleware:
    """Outermost of the app, so that whatever happens inside ends in an answer, a metric and a line of log."""

    def __init__(self, app: ASGIApp, metrics: Metrics, uploads: Uploads) -> None:
        self._app = app
        self._uploads = uploads
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(_request_id(scope), self._uploads.open(scope["path"]))
        scope.setdefault("state", {})["exchange"] = exchange
        start = time.monotonic()

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                if not exchange.is_cut_off:
                    exchange.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = exchange.request_id
            await send(message)

        try:
            await self._app(scope, _limited(receive, scope, exchange), send_named)
        except Exception:  # the process boundary: whatever a handler raises is logged with its id and answered
            request_id = exchange.request_id
            logger.exception("request %s failed unexpectedly", request_id, extra=fields(request_id=request_id))
            if exchange.status is not None:
                raise  # half an answer is out: only breaking the connection tells the client
            response = envelope(500, f"internal error; the log names it by {exchange.request_id}", "internal_error")
            await response(scope, receive, send_named)
        finally:
            exchange.upload.release()
            self._note(scope, exchange, time.monotonic() - start)

    def _note(self, scope: Scope, exchange: Exchange, elapsed_s: float) -> None:
        status = exchange.status or CLIENT_CLOSED_REQUEST
        # Unknown paths are one label, unknown methods another: clients choose both, and labels live for ever.
        route = getattr(scope.get("route"), "path", "unknown")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.count_exchange(route, method, status, exchange.error_code)
        path = shown_path(scope["path"])
        logger.log(
            _level(path, status),
            "%s %s %s %d in %.3f s%s",
            exchange.request_id,
            method,
            _one_line(path),
            status,
            elapsed_s,
            "".join(f" {name}={_one_line(value)}" for name, value in exchange.facts.items()),
            extra=fields(
                request_id=exchange.request_id,
                method=method,
                path=path,
                status=status,
                elapsed_s=round(elapsed_s, 6),
                **exchange.facts,
            ),
        )


def _level(path: str, status: int) -> int:
    """Requests for work are news, probes are not; failures are for the operator, refusals for the client."""
    if status == 500:
        return logging.ERROR
    return logging.INFO if path.startswith("/v1/") else logging.DEBUG


def _one_line(text: object) -> str:
    """`text` for the log: clients choose some of it, and must not write lines of their own."""
    return ascii(str(text)[:MAX_FIELD_CHARS])[1:-1]


def _request_id(scope: Scope) -> str:
    """The client's own id when it is usable, else a new one."""
    claimed = Headers(scope=scope).get("x-request-id", "")
    return claimed if _CLIENT_ID.fullmatch(claimed) else f"req-{uuid.uuid4().hex}"


def _limited(receive: Receive, scope: Scope, exchange: Exchange) -> Receive:
    """`receive`, which refuses a body that is too large as soon as too much of it has come.

    `exchange` notes a body that ends before it is whole.
    """
    is_whole = False

    async def receive_limited() -> Message:
        nonlocal is_whole
        message = await receive()
        if message["type"] == "http.disconnect":
            if not is_whole and exchange.status is None:
                exchange.cut_off(scope["state"].get("refusal"))
            return message
        is_whole = not message.get("more_body", False)
        exchange.upload.grow(len(message.get("body", b"")))
        return message

    return receive_limited
