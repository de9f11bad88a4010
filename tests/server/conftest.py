from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tetriserve.config import AccessConfig, ApiConfig
from tetriserve.engine import LiveEngine
from tetriserve.server import EngineSlot, create_app, run

sys.path.insert(0, str(Path(__file__).parent))  # for `fake_engine`, which is also run as a program

from fake_engine import FakeExecutor, make_engine  # noqa: E402
from live_server import Live  # noqa: E402

if TYPE_CHECKING:
    from tetriserve.server.tracing import Tracing

Connect = Callable[..., httpx.AsyncClient]
Draw = Callable[..., Awaitable[httpx.Response]]


@pytest.fixture(autouse=True)
def quick_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for clients that it does not have."""
    monkeypatch.setattr(run, "_REFUSALS_S", 0.0)


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
def connect() -> Connect:
    """A client of an app, without a socket between them. `settings` are those of `AccessConfig`."""

    def connect(
        slot: EngineSlot, tracing: Tracing | None = None, api: ApiConfig | None = None, **settings: Any
    ) -> httpx.AsyncClient:
        app = create_app(slot, AccessConfig(**settings), tracing, api)
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")

    return connect


@pytest.fixture
async def client(engine: LiveEngine, connect: Connect) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(EngineSlot(engine)) as client:
        yield client


class Clock:
    """What the event loop's clock is ahead of the real one: its timers expire when a test says so."""

    ahead_s = 0.0

    async def pass_by(self, seconds: float) -> None:
        """Put the clock forward, and have what is due then done, and what has been sent read."""
        self.ahead_s += seconds
        for _ in range(3):
            await asyncio.sleep(0.001)

    async def until(self, is_so: Callable[[], object], within_s: float) -> None:
        """Time passes a second after another, until `is_so`."""
        end_s = self.ahead_s + within_s
        while not is_so():
            assert self.ahead_s < end_s
            await self.pass_by(1.0)


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Name it before `live`, so that it is put back after the server's end."""
    clock = Clock()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: time.monotonic() + clock.ahead_s)
    return clock


@pytest.fixture
async def start_live(executor: FakeExecutor) -> AsyncIterator[Callable[..., Live]]:
    """Starts servers on ports. Those that a test leaves running are ended after it."""
    servers: list[Live] = []

    def start_live(**settings: Any) -> Live:
        servers.append(Live(executor, **settings))
        return servers[-1]

    yield start_live
    executor.gate.set()
    for server in servers:
        await server.end()


@pytest.fixture
async def live(start_live: Callable[..., Live]) -> Live:
    """A server on a port, whose queue holds four."""
    server = start_live(max_queue=4)
    await server.url
    return server


@pytest.fixture
def draw(client: httpx.AsyncClient) -> Draw:
    """Post an image request with these fields."""

    async def draw(headers: dict[str, str] | None = None, **fields: object) -> httpx.Response:
        body = {"prompt": "a lighthouse", "size": "64x64", **fields}
        return await client.post("/v1/images/generations", json=body, headers=headers)

    return draw
