"""The HTTP app, a thin layer: what it decides is how things look on the wire."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware

from tetriserve.config import AccessConfig, ApiConfig
from tetriserve.server import errors
from tetriserve.server.access import AccessMiddleware
from tetriserve.server.board import board_router
from tetriserve.server.chat import chat_router
from tetriserve.server.debug import debug_router
from tetriserve.server.edits import edits_router
from tetriserve.server.exchange import ExchangeMiddleware
from tetriserve.server.links import Links, links_router
from tetriserve.server.metrics import Metrics
from tetriserve.server.openai import openai_router
from tetriserve.server.probes import probe_router
from tetriserve.server.quotes import quote_router
from tetriserve.server.recent import RecentRuns
from tetriserve.server.slot import EngineSlot
from tetriserve.server.uploads import Uploads
from tetriserve.server.videos import videos_router
from tetriserve.server.work import Service

if TYPE_CHECKING:
    from tetriserve.server.tracing import Tracing


def create_app(
    slot: EngineSlot,
    access: AccessConfig | None = None,
    tracing: Tracing | None = None,
    api: ApiConfig | None = None,
    *,
    is_local: bool = False,
) -> FastAPI:
    """An ASGI app in front of the engine in `slot`, which runs on the app's event loop.

    The app can listen before the engine is there: until the slot is filled, `/health` answers 200, `/ready` and `/v1/*`
    503. With an engine at hand: `create_app(EngineSlot(engine))`. `tracing` makes spans of what it serves.
    `is_local`: see `AccessMiddleware`.
    """
    access, api = access or AccessConfig(), api or ApiConfig()
    app = FastAPI(
        title="TetriServe",
        version=version("tetriserve"),
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # a redirect has no envelope
    )
    metrics, recent = Metrics(slot), RecentRuns(slot)
    service = Service(slot, api, Links(api.url_ttl_s))
    # The last one added is the outermost.
    app.add_middleware(AccessMiddleware, config=access, is_local=is_local)
    if access.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("Authorization", "Content-Type", "Idempotency-Key", "Range", "X-Request-Id", "X-SLO-Ms"),
            expose_headers=(
                "Content-Range",
                "Retry-After",
                "X-Num-Frames",
                "X-Request-Id",
                "X-Seed",
                "X-Should-Retry",
                "X-Warnings",
                "openai-poll-after-ms",
            ),
        )
    if tracing is not None:
        app.add_middleware(tracing.middleware)
        slot.when_filled(tracing.attach)
    app.add_middleware(ExchangeMiddleware, metrics=metrics, uploads=Uploads())
    errors.install(app)
    # Says in /openapi.json that a key is needed; the middleware has asked for it before.
    guards = [Security(HTTPBearer(auto_error=False))] if access.api_keys else []
    app.include_router(openai_router(service), dependencies=guards)
    app.include_router(edits_router(service), dependencies=guards)
    app.include_router(chat_router(service), dependencies=guards)
    app.include_router(videos_router(service), dependencies=guards)
    app.include_router(quote_router(service), dependencies=guards)
    app.include_router(links_router(service.links))
    app.include_router(probe_router(slot, metrics))
    app.include_router(debug_router(recent), dependencies=guards)
    app.include_router(board_router(slot, recent))
    return app
