"""`/v1/images/edits`: images of a prompt and of pictures that come with it, in a form or as JSON."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from tetriserve.core.errors import InvalidRequest
from tetriserve.server import compat
from tetriserve.server.answers import STREAM_RESPONSES, answer
from tetriserve.server.compat import warnings_of
from tetriserve.server.edit_schemas import EditsRequest, edits_body
from tetriserve.server.errors import KEY_RESPONSES, RESPONSES
from tetriserve.server.exchange import CLIENT_CLOSED_REQUEST, Exchange
from tetriserve.server.forms import Part, read_form
from tetriserve.server.idempotency import KeyHeader
from tetriserve.server.pictures import files_of
from tetriserve.server.schemas import ImagesResponse
from tetriserve.server.streaming import EDIT
from tetriserve.server.uploads import EDITS
from tetriserve.server.work import IdHeader, Service, SloHeader

MAX_FIELD_BYTES = 2**16
"""Of a text in a form: 8000 characters of a prompt, and room to spare."""

_NUMBER = re.compile(r"-?(0|[1-9]\d{0,399})(\.\d{1,400})?([eE][+-]?\d{1,4})?", re.ASCII)
_WORDS = {"true": True, "false": False}
_LORA_FIELD = re.compile(r"lora\[(\w+)\]", re.ASCII)
"""How clients write `{"lora": {"scale": 1}}`."""


class Asked(NamedTuple):
    """What a body says. `files` are pictures, of which nothing is checked; `param` is what the client calls them."""

    body: EditsRequest
    files: list[bytes]
    param: str


def edits_router(service: Service) -> APIRouter:
    router = APIRouter(responses=RESPONSES)

    @router.post(
        EDITS,
        response_model=ImagesResponse,
        responses=STREAM_RESPONSES | KEY_RESPONSES,
        openapi_extra={"requestBody": edits_body()},
    )
    async def edit_images(
        request: Request,
        x_slo_ms: SloHeader = None,
        x_request_id: IdHeader = None,
        idempotency_key: KeyHeader = None,
    ) -> Response:
        """Make `n` images of a prompt and of pictures: as `/v1/images/generations`. Models say in `/v1/models` how many
        pictures they take, and whether the image starts from one (`strength`).
        """
        exchange: Exchange = request.state.exchange
        service.slot.require()
        try:
            asked = await _read(request)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if not asked.files:
            raise InvalidRequest("image is required", "image")
        warnings = warnings_of(asked.body, compat.EDIT, service.api.compat)
        work = await service.work_with(request, asked.body, x_slo_ms, asked.files, asked.param, warnings)
        del asked
        exchange.upload.release()
        return await answer(work, idempotency_key, EDIT)

    return router


async def _read(request: Request) -> Asked:
    body = b"".join([chunk async for chunk in request.stream()])
    content_type = request.headers.get("content-type", "")
    match content_type.partition(";")[0].strip().lower():
        case "multipart/form-data":
            return await asyncio.to_thread(lambda: _of_form(read_form(body, content_type)))
        case "application/json":
            return await asyncio.to_thread(_of_json, body)
    raise InvalidRequest(
        "send the body as a form or as JSON, with the header Content-Type: multipart/form-data or application/json"
    )


def _of_json(body: bytes) -> Asked:
    try:
        said = json.loads(body)
    except json.JSONDecodeError as error:
        what = {"type": "json_invalid", "loc": ("body", error.pos), "ctx": {"error": error.msg}, "input": {}}
        raise RequestValidationError([what]) from None
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is not valid JSON") from None
    asked = _validated(said)
    return Asked(asked, *pictures_of(asked))


def pictures_of(asked: EditsRequest) -> tuple[list[bytes], str]:
    """The files within the URLs, and the field that they are in. Call it off the event loop.

    Raises:
        InvalidRequest: there are two such fields, or no data URLs.
    """
    if asked.image and asked.images:
        raise InvalidRequest("images stands beside image; leave one out", "images")
    param = "images" if asked.images else "image"
    return files_of(asked.images or asked.image, param), param


def _of_form(parts: Sequence[Part]) -> Asked:
    files = [bytes(part.content) for part in parts if _name_of(part) == "image"]
    fields: dict[str, Any] = {}
    for part in parts:
        name = _name_of(part)
        if name == "image":
            continue
        value = _value_of(name, part)
        if match := _LORA_FIELD.fullmatch(part.name):
            lora = fields.setdefault(name, {})
            if not isinstance(lora, dict) or match[1] in lora:
                raise InvalidRequest(f"{name} is given twice", name)
            lora[match[1]] = value
        elif name not in fields:
            fields[name] = [value] if part.name.endswith("[]") else value
        elif name == "degrees":
            fields[name] = [*_listed(fields[name]), value]
        else:
            raise InvalidRequest(f"{name} is given twice", name)
    return Asked(_validated(fields), files, "image")


def _name_of(part: Part) -> str:
    """Without brackets, by which clients write lists and objects."""
    return part.name.partition("[")[0]


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _value_of(name: str, part: Part) -> object:
    """The text, or the number or the boolean that a field which takes no text says in the way of JSON.

    Raises:
        InvalidRequest: it is no text.
    """
    if name not in EditsRequest.model_fields:
        return None  # which is refused by its name
    if name == "images":
        raise InvalidRequest("images is a field of JSON; in a form pictures are files called image", name)
    if part.is_file:
        raise InvalidRequest(f"{name} is a file; allowed: text", name)
    if len(part.content) > MAX_FIELD_BYTES:
        raise InvalidRequest(f"{name} has {len(part.content)} bytes; allowed: at most {MAX_FIELD_BYTES}", name)
    try:
        text = part.content.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{name} is not UTF-8", name) from None
    if name in _TEXTS and part.name != "lora[scale]":
        return text
    return json.loads(text) if _NUMBER.fullmatch(text) else _WORDS.get(text, text)


def _validated(said: object) -> EditsRequest:
    try:
        return EditsRequest.model_validate(said)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in errors]) from None


def _takes_text(annotation: object) -> bool:
    return annotation is str or isinstance(annotation, str) or any(map(_takes_text, get_args(annotation)))


_TEXTS = frozenset(name for name, field in EditsRequest.model_fields.items() if _takes_text(field.annotation))
