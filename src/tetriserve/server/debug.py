"""For whoever wants to know what the pool is doing."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated

from fastapi import APIRouter, Query, Response

from tetriserve.server.errors import RESPONSES
from tetriserve.server.recent import KEEP_S, RecentRuns

Seconds = Annotated[float, Query(gt=0, le=KEEP_S, description="How far back.")]


def debug_router(recent: RecentRuns) -> APIRouter:
    router = APIRouter(responses={status: RESPONSES[status] for status in (400, 401, 503)})

    @router.get("/debug/trace", response_class=Response)
    async def trace(seconds: Seconds = 30.0) -> Response:
        """The last tasks as a trace for ui.perfetto.dev or chrome://tracing: a row per rank, a block per task."""
        excerpt = recent.last(seconds)
        content = await asyncio.to_thread(lambda: json.dumps(excerpt.trace()))
        return Response(content, media_type="application/json")

    return router
