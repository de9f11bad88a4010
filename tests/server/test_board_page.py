"""The page at `/`: whole without the outside world, open to everyone, while its stream takes a key."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest

from tests.waiting import HANG_S, until
from tetriserve.server import EngineSlot, run
from tetriserve.server.board.pages import ASSETS

KEY = "sk-secret"


@pytest.fixture
async def guarded(engine, connect):
    async with connect(EngineSlot(engine), api_keys=(KEY,)) as client:
        yield client


@pytest.mark.parametrize("path", sorted(ASSETS))
async def test_every_part_is_served_to_everyone_under_a_strict_policy(guarded, path):
    response = await guarded.get(path)
    assert response.status_code == 200
    assert response.headers["Content-Type"].split(";")[0] in (
        "text/html",
        "text/css",
        "text/javascript",
        "image/svg+xml",
    )
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_the_page_refers_to_its_own_parts_alone(client):
    page = (await client.get("/")).text
    parts = set(re.findall(r'(?:src|href)="([^"#]+)"', page))
    assert {"board/app.js", "board/page.css", "board/theme.js", "board/icon.svg"} == parts
    for path, asset in ASSETS.items():
        text = asset.content.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.findall(r"https?://|//cdn|@import|url\(", text), path
        for imported in re.findall(r'from "\./([^"]+)"', text):
            assert f"/board/{imported}" in ASSETS


async def test_nothing_in_the_page_needs_a_weaker_policy():
    page = ASSETS["/"].content.decode()
    assert not re.findall(r"<script(?![^>]*src)|<style|\sstyle=|\son\w+=", page)


async def test_the_stream_takes_a_key(guarded):
    response = await guarded.get("/board/events")
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"


async def test_there_is_no_stream_before_the_engine_is_there(connect):
    async with connect(EngineSlot()) as client:
        response = await client.get("/board/events")
        assert (await client.get("/")).status_code == 200
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "not_ready"


async def test_no_other_path_is_opened_by_the_page(guarded):
    for path in ("/board", "/board/", "/board/page.html", "/board/../v1/models", "/board/nothing.js"):
        assert (await guarded.get(path)).status_code == 401


async def test_an_open_page_does_not_delay_the_end_of_the_server(start_live, monkeypatch):
    monkeypatch.setattr(run, "_LAST_ANSWERS_S", 10 * HANG_S)
    server = start_live()
    async with (
        httpx.AsyncClient(base_url=await server.url, timeout=HANG_S) as http,
        http.stream("GET", "/board/events") as stream,
    ):
        text = stream.aiter_text()
        assert (await anext(text)).startswith("event: snapshot")
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        assert await asyncio.wait_for(server.stop(), HANG_S) == 0


async def test_a_page_that_is_closed_is_forgotten(start_live):
    before = asyncio.all_tasks()
    server = start_live()

    def is_watched():
        return any("_flush_regularly" in str(task.get_coro()) for task in asyncio.all_tasks() - before)

    async with httpx.AsyncClient(base_url=await server.url, timeout=HANG_S) as http:
        for _ in range(3):
            async with http.stream("GET", "/board/events") as stream:
                await anext(stream.aiter_text())
                assert is_watched()
        await until(lambda: not is_watched())
    assert await server.stop() == 0
