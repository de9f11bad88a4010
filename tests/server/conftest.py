from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tetriserve.engine import LiveEngine
from tetriserve.server import EngineSlot, create_app

sys.path.insert(0, str(Path(__file__).parent))  # for `fake_engine`, which is also run as a program

from fake_engine import FakeExecutor, make_engine  # noqa: E402


@pytest.fixture
async def executor() -> FakeExecutor:
    return FakeExecutor()


@pytest.fixture
async def engine(executor: FakeExecutor) -> AsyncIterator[LiveEngine]:
    engine = make_engine(executor)
    yield engine
    executor.gate.set()
    await engine.stop()


@pytest.fixture
async def client(engine: LiveEngine) -> AsyncIterator[httpx.AsyncClient]:
    """Talks to the app without a socket."""
    transport = httpx.ASGITransport(create_app(EngineSlot(engine)))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client
