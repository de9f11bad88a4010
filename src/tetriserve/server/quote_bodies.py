"""Bodies of `/v1/quotes`: as JSON, what is asked of images, or of a video."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request

from tetriserve.core.errors import InvalidRequest
from tetriserve.engine.models import ServedModels
from tetriserve.server.bodies import Asked, BodyReader, parsed_json
from tetriserve.server.edit_schemas import EditsRequest
from tetriserve.server.edits import edits_reader
from tetriserve.server.schemas import inlined
from tetriserve.server.video_schemas import VideosRequest
from tetriserve.server.video_work import videos_reader

_OF_VIDEOS = ("seconds", "input_reference", "boundary_ratio", "flow_shift")
"""Fields that no image has."""


async def read_quote(request: Request, models: ServedModels) -> Asked[EditsRequest] | Asked[VideosRequest]:
    """
    Raises:
        InvalidRequest, RequestValidationError: it is neither.
        ClientDisconnect: the client is gone.
    """
    if not _is_json(request.headers.get("content-type", "")):
        raise InvalidRequest("send the body as JSON, with the header Content-Type: application/json")
    said = parsed_json(b"".join([chunk async for chunk in request.stream()]))
    if asks_for_video(said, models):
        return await _read(request, videos_reader(), VideosRequest, said)
    return await _read(request, edits_reader(), EditsRequest, said)


def asks_for_video(said: object, models: ServedModels) -> bool:
    """By a field that only videos have, or else by the model that is named, or would be taken."""
    if not isinstance(said, dict):
        return False
    if any(said.get(name) is not None for name in _OF_VIDEOS) or said.get("num_frames") not in (None, 1):
        return True
    name = said.get("model")
    named = [
        intake.card.makes_videos
        for intake in models.intakes
        if not isinstance(name, str) or intake.card.is_called(name)
    ]
    return bool(named) and all(named)


def quote_body() -> dict[str, Any]:
    """`requestBody` for `/openapi.json`."""
    schemas = [inlined(schema) for schema in (EditsRequest, VideosRequest)]
    return {"required": True, "content": {"application/json": {"schema": {"anyOf": schemas}}}}


async def _read(request: Request, reader: BodyReader[Any], schema: type[Any], said: object) -> Asked[Any]:
    request.state.schema = schema
    return await asyncio.to_thread(reader.of_json, said)


def _is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))
