"""`/v1/images/edits`: images of a prompt and of pictures that come with it, in a form or as JSON."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from tetriserve.core.errors import InvalidRequest
from tetriserve.server import compat
from tetriserve.server.answers import STREAM_RESPONSES, answer
from tetriserve.server.bodies import BodyReader
from tetriserve.server.compat import warnings_of
from tetriserve.server.edit_schemas import EditsRequest, edits_body
from tetriserve.server.errors import KEY_RESPONSES, RESPONSES
from tetriserve.server.exchange import CLIENT_CLOSED_REQUEST, Exchange
from tetriserve.server.idempotency import KeyHeader
from tetriserve.server.pictures import files_of
from tetriserve.server.schemas import ImagesResponse
from tetriserve.server.streaming import EDIT
from tetriserve.server.uploads import EDITS
from tetriserve.server.work import IdHeader, Service, SloHeader


def edits_router(service: Service) -> APIRouter:
    router = APIRouter(responses=RESPONSES)
    reader = edits_reader()

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
            asked = await reader.read(request)
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


def edits_reader() -> BodyReader[EditsRequest]:
    return BodyReader(EditsRequest, "image", pictures_of, json_only=frozenset({"images"}))


def pictures_of(asked: EditsRequest) -> tuple[list[bytes], str]:
    """The files within the URLs, and the field that they are in. Call it off the event loop.

    Raises:
        InvalidRequest: there are two such fields, or no data URLs.
    """
    if asked.image and asked.images:
        raise InvalidRequest("images stands beside image; leave one out", "images")
    param = "images" if asked.images else "image"
    return files_of(asked.images or asked.image, param), param
