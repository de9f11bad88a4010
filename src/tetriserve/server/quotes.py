"""What a deadline could be promised for: the same question as a generation, and nothing is queued."""

from __future__ import annotations

import math
import time
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from tetriserve.core.forecast import Quote
from tetriserve.server.access import Caller
from tetriserve.server.compat import EDIT, warnings_of
from tetriserve.server.errors import RESPONSES
from tetriserve.server.exchange import CLIENT_CLOSED_REQUEST
from tetriserve.server.quote_bodies import quote_body, read_quote
from tetriserve.server.schemas import QuotedImage, QuoteResponse
from tetriserve.server.uploads import QUOTES
from tetriserve.server.video_schemas import VideosRequest
from tetriserve.server.video_work import work_of
from tetriserve.server.work import IdHeader, Service, SloHeader


def quote_router(service: Service) -> APIRouter:
    router = APIRouter(responses=RESPONSES)

    @router.post(QUOTES, response_model=QuoteResponse, openapi_extra={"requestBody": quote_body()})
    async def quote(request: Request, x_slo_ms: SloHeader = None, x_request_id: IdHeader = None) -> Response:
        """Could these images, or this video, be made by their deadline, and when would they be done? Takes the body of
        a generation, an edit or a video as JSON.
        """
        engine = service.slot.require()
        try:
            asked = await read_quote(request, engine.models)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if isinstance(asked.body, VideosRequest):
            video = await work_of(service, request, asked, x_slo_ms)
            card, generations, warnings = video.card, [video.generation], list(video.facts.warnings)
        else:
            ignored = warnings_of(asked.body, EDIT, service.api.compat)
            work = await service.work_with(request, asked.body, x_slo_ms, asked.files, asked.param, ignored)
            card, generations, warnings = work.card, work.generations, work.warnings
        client: Caller = request.state.client
        client.allowance.use_rate(1, time.monotonic())  # however many images: it is the asking that costs
        quote = await engine.quote(generations)
        request.state.exchange.facts["feasible"] = quote.is_feasible
        answered = _response(quote, warnings, card.name if engine.models.are_several else None)
        return Response(answered.model_dump_json(exclude_unset=True), media_type="application/json")

    return router


def _response(quote: Quote, warnings: list[str], model: str | None) -> QuoteResponse:
    """`model`: its name, where several are served."""

    def milliseconds(time_s: float) -> float | None:
        return None if math.isinf(time_s) else round((time_s - quote.arrival_s) * 1000, 3)

    said: dict[str, Any] = {"warnings": warnings} if warnings else {}
    if model is not None:
        said["model"] = model
    return QuoteResponse(
        **said,
        feasible=quote.is_feasible,
        slo_ms=round((quote.deadline_s - quote.arrival_s) * 1000, 3),
        predicted_finish_ms=milliseconds(quote.finish_s),
        earliest_deadline_ms=milliseconds(quote.earliest_deadline_s),
        queue_position=quote.position,
        data=[
            QuotedImage(predicted_finish_ms=milliseconds(expected.finish_s), degrees=list(expected.degrees))
            for expected in quote.requests
        ],
    )
