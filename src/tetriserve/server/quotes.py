"""What a deadline could be promised for: the same question as a generation, and nothing is queued."""

from __future__ import annotations

import math
import time

from fastapi import APIRouter, Request

from tetriserve.core.forecast import Quote
from tetriserve.server.access import Caller
from tetriserve.server.errors import RESPONSES
from tetriserve.server.exchange import Exchange
from tetriserve.server.generations import generations_of, size_for_log
from tetriserve.server.openai import IdHeader, SloHeader
from tetriserve.server.schemas import ImagesRequest, QuotedImage, QuoteResponse
from tetriserve.server.slot import EngineSlot


def quote_router(slot: EngineSlot) -> APIRouter:
    router = APIRouter(responses=RESPONSES)

    @router.post("/v1/quotes")
    async def quote_images(
        request: Request, body: ImagesRequest, x_slo_ms: SloHeader = None, x_request_id: IdHeader = None
    ) -> QuoteResponse:
        """Could these images be made by their deadline, and when would they be done? Takes the body of a generation."""
        exchange: Exchange = request.state.exchange
        exchange.request_id = body.request_id or exchange.request_id
        engine = slot.require()
        generations = generations_of(body, engine, x_slo_ms)
        client: Caller = request.state.client
        client.allowance.use_rate(1, time.monotonic())  # however many images: it is the asking that costs
        quote = await engine.quote(generations)
        exchange.facts |= {"size": size_for_log(body.size), "n": len(generations), "feasible": quote.is_feasible}
        return _response(quote)

    return router


def _response(quote: Quote) -> QuoteResponse:
    def milliseconds(time_s: float) -> float | None:
        return None if math.isinf(time_s) else round((time_s - quote.arrival_s) * 1000, 3)

    return QuoteResponse(
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
