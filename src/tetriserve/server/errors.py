"""From errors to HTTP: the one place that knows status codes, in OpenAI's envelope."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from tetriserve.core.errors import (
    DeadlineInfeasible,
    InvalidRequest,
    JournalError,
    KeyReused,
    QueueFull,
    RequestFailed,
    ShuttingDown,
    TetriServeError,
    UnknownModel,
    UnknownVideo,
    VideoFailed,
    VideoNotReady,
)
from tetriserve.core.events import FailureKind
from tetriserve.server import chat_schemas, edit_schemas, schemas, video_schemas
from tetriserve.server.chat_schemas import ChatRequest
from tetriserve.server.edit_schemas import EditsRequest
from tetriserve.server.limits import OverLimit
from tetriserve.server.schemas import ErrorEnvelope, ImagesRequest
from tetriserve.server.slot import NotReady
from tetriserve.server.uploads import CHAT
from tetriserve.server.video_schemas import VideosRequest

RESTART_S = 5.0
"""When to come back to a server that starts or shuts down."""
_SOON_S = 1.0
"""When to come back for a video that is on its way: `/v1/videos/{id}` says it better."""

RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorEnvelope, "description": "The request is at fault; `param` names the field."},
    401: {"model": ErrorEnvelope, "description": "No API key, or one that is not known here."},
    404: {
        "model": ErrorEnvelope,
        "description": "The model is not served here, or nothing is at this address, or no video has this id.",
    },
    405: {"model": ErrorEnvelope, "description": "The address takes another method."},
    413: {"model": ErrorEnvelope, "description": "The body is too large."},
    429: {
        "model": ErrorEnvelope,
        "description": "Not admitted (queue_full, deadline_infeasible, rate_limit_exceeded, "
        "concurrency_limit_exceeded); see Retry-After.",
    },
    500: {
        "model": ErrorEnvelope,
        "description": "The request was accepted and failed: generation_failed (it would fail again; X-Should-Retry is "
        "false), worker_lost, out_of_memory, internal_error.",
    },
    503: {
        "model": ErrorEnvelope,
        "description": "The server is starting or shutting down, or its journal cannot be written, or its tensor store "
        "is full; see Retry-After.",
    },
    "default": {"model": ErrorEnvelope, "description": "Any other error."},
}
"""For `/openapi.json`."""

KEY_RESPONSES: dict[int | str, dict[str, Any]] = {
    422: {"model": ErrorEnvelope, "description": "The idempotency key stands for other pictures already."}
}
"""For `/openapi.json`, where a key can be used."""

_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large", 429: "queue_full"}
_HTTP_NAMES = {"num_steps": "num_inference_steps"}
"""Of fields that Python names otherwise (`engine.intake.Generation`)."""
_UNSERVED = schemas.UNSERVED | chat_schemas.UNSERVED | edit_schemas.UNSERVED | video_schemas.UNSERVED
_LOGGED_PARAMS = frozenset(
    (
        *EditsRequest.model_fields,
        *ChatRequest.model_fields,
        *VideosRequest.model_fields,
        *_UNSERVED,
        "Idempotency-Key",
        "X-Request-Id",
        "X-SLO-Ms",
        "after",
        "limit",
        "order",
        "variant",
    )
)
_FAILURE_CODES = {
    FailureKind.STEP: "generation_failed",
    FailureKind.MEMORY: "out_of_memory",
    FailureKind.LOST: "worker_lost",
    FailureKind.STORE: "store_unavailable",
    None: "internal_error",
}
_PATH = re.compile(r"(?<![\w.:/-])/[^\s'\"),;:]*[^\s'\"),;:.]")
"""Absolute paths of this host: libraries name them in their errors, and they are the operator's affair."""
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


def install(app: FastAPI) -> None:
    """Answer every error of `app` in the envelope. What no handler knows ends in `exchange.ExchangeMiddleware`."""

    async def on_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, TetriServeError)
        return _noted(request, response_to(error))

    async def on_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        message, param = _explain(error.errors()[0])
        if message.startswith("unknown field"):
            message += f"; allowed: {', '.join(_fields_of(request))}"
        return _noted(request, envelope(400, message, "invalid_value", param))

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        match error.status_code:
            case 404:
                message = f"there is no {request.method} {request.url.path} here; /openapi.json lists what there is"
            case 405:
                message = f"{request.url.path} does not answer {request.method}"
            case 400:
                message = "the body is not valid JSON"
            case _:
                message = str(error.detail)
        code = _HTTP_CODES.get(error.status_code, "invalid_value")
        return _noted(request, envelope(error.status_code, message, code, headers=error.headers))

    app.add_exception_handler(TetriServeError, on_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_error)


class ErrorResponse(Response):
    """An answer in the envelope. `code` and `facts` are kept for the metrics and the log.

    facts: never what the client wrote, which the message of a client's mistake may quote, as may `param`.
    """

    def __init__(self, status: int, error: Mapping[str, object], headers: Mapping[str, str]) -> None:
        # Messages quote clients, who may send what UTF-8 cannot hold (a lone surrogate): json.dumps escapes to ASCII.
        super().__init__(json.dumps({"error": error}), status, headers, media_type="application/json")
        self.code, self.message = str(error["code"]), str(error["message"])
        self.facts: dict[str, object] = {"code": self.code}
        if error["param"] in _LOGGED_PARAMS:
            self.facts["param"] = error["param"]
        if status >= 429:
            self.facts["error"] = error["message"]


def envelope(
    status: int,
    message: str,
    code: str,
    param: str | None = None,
    *,
    retry_after_s: float | None = None,
    earliest_deadline_ms: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> ErrorResponse:
    """An error as OpenAI writes it. `retry_after_s` becomes a header of whole seconds, at least 1."""
    all_headers = dict(headers or {})
    if retry_after_s is not None:
        all_headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if status >= 500:
        message = _PATH.sub("(path)", message)
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    error: dict[str, object] = {"message": message, "type": kind, "param": param, "code": code}
    if earliest_deadline_ms is not None:
        error["earliest_deadline_ms"] = earliest_deadline_ms
    return ErrorResponse(status, error, all_headers)


def _noted(request: Request, response: ErrorResponse) -> ErrorResponse:
    """`response`, once the log line and the metrics of this exchange know of it."""
    request.state.exchange.note_error(response)
    return response


def response_to(error: TetriServeError) -> ErrorResponse:
    """What a client is told of an error."""
    message = str(error)
    match error:
        case UnknownModel():
            return envelope(404, message, "model_not_found", error.param)
        case KeyReused():
            return envelope(422, message, "idempotency_key_reused", "Idempotency-Key")
        case InvalidRequest(param=param):
            name = None if param is None else _HTTP_NAMES.get(param, param)
            if param is not None and name is not None and message.startswith(param):
                message = name + message[len(param) :]
            return envelope(400, message, "invalid_value", name)
        case UnknownVideo():
            return envelope(404, message, "not_found")
        case VideoNotReady():
            return envelope(409, message, "video_not_ready", retry_after_s=_SOON_S)
        case VideoFailed():
            return envelope(409, message, "video_failed", headers={"X-Should-Retry": "false"})
        case QueueFull():
            return envelope(429, message, "queue_full", retry_after_s=error.retry_after_s)
        case DeadlineInfeasible():
            return envelope(
                429,
                message,
                "deadline_infeasible",
                "slo_ms",
                retry_after_s=error.retry_after_s,
                earliest_deadline_ms=_milliseconds(error.earliest_deadline_s),
            )
        case OverLimit():
            return envelope(429, message, error.code, retry_after_s=error.retry_after_s)
        case ShuttingDown():
            return envelope(503, message, "shutting_down", retry_after_s=RESTART_S, headers={"Connection": "close"})
        case NotReady():
            return envelope(503, message, "not_ready", retry_after_s=RESTART_S)
        case JournalError():
            return envelope(503, message, "journal_unavailable", retry_after_s=RESTART_S)
        case RequestFailed(kind=FailureKind.STORE as kind):
            return envelope(503, message, _FAILURE_CODES[kind], retry_after_s=RESTART_S)
        case RequestFailed(kind=kind):
            headers = {"X-Should-Retry": "false"} if kind is FailureKind.STEP else None
            return envelope(500, message, _FAILURE_CODES[kind], headers=headers)
        case _:
            return envelope(500, message, "internal_error")


def _fields_of(request: Request) -> Collection[str]:
    """What the body of the request may hold: `state.schema` is set by what reads bodies of more than one kind."""
    default = ChatRequest if request.url.path == CHAT else ImagesRequest
    schema: type[BaseModel] = getattr(request.state, "schema", default)
    return schema.model_fields


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _explain(error: Mapping[str, Any]) -> tuple[str, str | None]:
    """One pydantic error as a sentence and the field's name; None for the body as a whole."""
    kind, location, value = error["type"], error["loc"], error.get("input")
    if kind == "json_invalid":
        return f"the body is not valid JSON: {error['ctx']['error']} at character {location[1]}", None
    if len(location) < 2:
        if isinstance(value, bytes):
            return "send the body as JSON, with the header Content-Type: application/json", None
        return "the body must be a JSON object", None
    is_nested = location[1] == "extra_body" and len(location) > 2
    param = str(location[2 if is_nested else 1])
    match kind:
        case "missing":
            return f"{param} is required", param
        case "extra_forbidden" if param in _UNSERVED:
            return f"{param} is not served: {_UNSERVED[param]}", param
        case "extra_forbidden":
            return f"unknown field {_repr.repr(param)}", param
        case "picture":
            return f"{param} {error['msg']}", param  # what it holds is in no message
        case "literal_error":
            return f"{param} is {_repr.repr(value)}; served: {error['ctx']['expected']}", param
        case "string_pattern_mismatch":
            return f"{param} is {_repr.repr(value)}; allowed: 1 to 128 printable ASCII characters", param
        case "too_long" if error["ctx"]["max_length"] == 0:
            return f"{param} is not served: the answer is an image", param
        case _ if param == "messages":
            return f"{param}: {error['msg'][0].lower() + error['msg'][1:]}", param  # they hold prompts and pictures
        case _:
            reason = error["msg"][0].lower() + error["msg"][1:]
            return f"{param} is {_repr.repr(value)}; {reason}", param
