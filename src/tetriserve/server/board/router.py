"""Routes of the board: the page, its parts, and the stream that it draws."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from tetriserve.server.board.hub import BoardHub
from tetriserve.server.board.pages import ASSETS, HEADERS, Asset
from tetriserve.server.recent import RecentRuns
from tetriserve.server.slot import EngineSlot


def board_router(slot: EngineSlot, recent: RecentRuns) -> APIRouter:
    """Not part of the described API: a page for people, and a stream for that page (docs/board.md)."""
    router = APIRouter(include_in_schema=False)
    hub = BoardHub(slot, recent)

    @router.get("/board/events")
    async def events() -> MessageStream:
        """What happens in the pool, as server-sent events."""
        return MessageStream(hub.watch())

    for path, asset in ASSETS.items():
        router.add_api_route(path, _page(asset), methods=["GET"])
    return router


class MessageStream(StreamingResponse):
    """The answer: every message of `messages`, which are closed when it ends, also when its client leaves.

    Starlette drops the generator unclosed when the client leaves while a message is being sent: the hub would watch for
    that page until the garbage collector's oldest generation finds it.
    """

    def __init__(self, messages: AsyncGenerator[bytes, None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the latter is for nginx
        super().__init__(messages, media_type="text/event-stream", headers=headers)
        self._messages = messages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._messages):
            await super().__call__(scope, receive, send)


def _page(asset: Asset) -> Callable[[], Awaitable[Response]]:

    async def page() -> Response:
        return Response(asset.content, media_type=asset.media_type, headers=HEADERS)

    return page
