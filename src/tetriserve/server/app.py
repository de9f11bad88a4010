"""The HTTP app, a thin layer: what it decides is how things look on the wire."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI

from tetriserve.server import errors
from tetriserve.server.exchange import ExchangeMiddleware
from tetriserve.server.metrics import Metrics
from tetriserve.server.openai import openai_router
from tetriserve.server.probes import probe_router
from tetriserve.server.slot import EngineSlot


def create_app(slot: EngineSlot) -> FastAPI:
    """An ASGI app in front of the engine in `slot`, which runs on the app's event loop.

    The app can listen before the engine is there: until the slot is filled, `/health` answers 200, `/ready` and `/v1/*`
    503. With an engine at hand: `create_app(EngineSlot(engine))`.
    """
    app = FastAPI(
        title="TetriServe",
        version=version("tetriserve"),
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # a redirect has no envelope
    )
    metrics = Metrics(slot)
    app.add_middleware(ExchangeMiddleware, metrics=metrics)
    errors.install(app)
    app.include_router(openai_router(slot))
    app.include_router(probe_router(slot, metrics))
    return app
