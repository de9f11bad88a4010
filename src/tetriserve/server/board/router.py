"""Routes of the board: the page, its parts, and the stream that it draws."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse

from tetriserve.server.board.hub import BoardHub
from tetriserve.server.board.pages import ASSETS, HEADERS, Asset
from tetriserve.server.recent import RecentRuns
from tetriserve.server.slot import EngineSlot


def board_router(slot: EngineSlot, recent: RecentRuns) -> APIRouter:
    """Not part of the described API: a page for people, and a stream for that page (docs/board.md)."""
    router = APIRouter(include_in_schema=False)
    hub = BoardHub(slot, recent)

    @router.get("/board/events")
    async def events() -> StreamingResponse:
        """What happens in the pool, as server-sent events."""
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the latter is for nginx
        return StreamingResponse(hub.watch(), media_type="text/event-stream", headers=headers)

    for path, asset in ASSETS.items():
        router.add_api_route(path, _page(asset), methods=["GET"])
    return router


def _page(asset: Asset) -> Callable[[], Awaitable[Response]]:

    async def page() -> Response:
        return Response(asset.content, media_type=asset.media_type, headers=HEADERS)

    return page
