"""For whoever runs the server: is it alive, is it ready, what does it count."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from tetriserve.server.errors import RESTART_S, envelope
from tetriserve.server.metrics import Metrics
from tetriserve.server.schemas import ErrorEnvelope, Probe
from tetriserve.server.slot import EngineSlot


def probe_router(slot: EngineSlot, metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/health", response_model=Probe, responses={503: {"model": ErrorEnvelope}})
    async def health() -> Probe | Response:
        """The process serves: 200 while it starts, works and drains; 503 when only a restart can help."""
        if slot.engine is not None and slot.engine.failure is not None:
            return envelope(503, slot.engine.failure, "engine_failed")
        return Probe(status="alive")

    @router.get("/ready", response_model=Probe, responses={503: {"model": ErrorEnvelope}})
    async def ready() -> Probe | Response:
        """Whether a request sent now would be admitted and run; 503 says why not."""
        reason = slot.unready_reason
        return Probe(status="ready") if reason is None else envelope(503, reason, "not_ready", retry_after_s=RESTART_S)

    @router.get("/metrics", response_class=Response)
    async def expose_metrics(request: Request) -> Response:
        """Metrics for Prometheus."""
        content, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": content_type})

    return router
