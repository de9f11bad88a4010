"""What a deadline could be promised for: the same question as a generation, and nothing is queued."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from fastapi import APIRouter, Request

from tetriserve.core.forecast import Quote
from tetriserve.server.access import Caller
from tetriserve.server.compat import EDIT, warnings_of
from tetriserve.server.edit_schemas import EditsRequest
from tetriserve.server.edits import pictures_of
from tetriserve.server.errors import RESPONSES
from tetriserve.server.schemas import QuotedImage, QuoteResponse
from tetriserve.server.uploads import QUOTES
from tetriserve.server.work import IdHeader, ImageWork, Service, SloHeader


def quote_router(service: Service) -> APIRouter:
    router = APIRouter(responses=RESPONSES)

    @router.post(QUOTES, response_model_exclude_unset=True)
    async def quote_images(
        request: Request, body: EditsRequest, x_slo_ms: SloHeader = None, x_request_id: IdHeader = None
    ) -> QuoteResponse:
        """Could these images be made by their deadline, and when would they be done? Takes the body of a generation, or
        of an edit as JSON.
        """
        service.slot.require()
        warnings = warnings_of(body, EDIT, service.api.compat)
        files, param = await asyncio.to_thread(pictures_of, body)
        work = await service.work_with(request, body, x_slo_ms, files, param, warnings)
        client: Caller = request.state.client
        client.allowance.use_rate(1, time.monotonic())  # however many images: it is the asking that costs
        quote = await work.engine.quote(work.generations)
        work.exchange.facts["feasible"] = quote.is_feasible
        return _response(quote, work)

    return router


def _response(quote: Quote, work: ImageWork) -> QuoteResponse:
    def milliseconds(time_s: float) -> float | None:
        return None if math.isinf(time_s) else round((time_s - quote.arrival_s) * 1000, 3)

    said: dict[str, Any] = {"warnings": work.warnings} if work.warnings else {}
    if work.engine.models.are_several:
        said["model"] = work.card.name
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
