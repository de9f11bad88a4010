"""Images by URL: served for a while to whoever knows their names, and never more of them than fit."""

from __future__ import annotations

import base64
import re

import httpx
import pytest
from fake_engine import FakeExecutor, make_journalled_jobs

from tests.waiting import HANG_S
from tetriserve.config import ApiConfig
from tetriserve.server import EngineSlot
from tetriserve.server.images import Encoding
from tetriserve.server.links import PREFIX, Links

URL = "/v1/images/generations"
BODY = {"prompt": "a lighthouse", "size": "64x64", "seed": 7}
LINK = re.compile(r"http://server/v1/images/links/[A-Za-z0-9_-]{32}\.(png|jpeg|webp)")


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_a_url_leads_to_the_file_that_base64_would_have_been(client, draw, output_format):
    plain = (await draw(seed=7, n=2, output_format=output_format)).json()
    answer = (await draw(seed=7, n=2, output_format=output_format, response_format="url")).json()
    urls = [item["url"] for item in answer["data"]]
    assert len(set(urls)) == 2
    for item, inline in zip(answer["data"], plain["data"], strict=True):
        assert "b64_json" not in item
        assert LINK.fullmatch(item["url"])
        assert item["url"].endswith(output_format)
        assert (item["seed"], "schedule" in item) == (inline["seed"], True)
        file = await client.get(item["url"])
        assert file.status_code == 200
        assert file.headers["Content-Type"] == Encoding(output_format).media_type
        assert file.headers["Cache-Control"] in ("private, max-age=3600", "private, max-age=3599")
        assert file.headers["X-Content-Type-Options"] == "nosniff"
        assert base64.b64decode(inline["b64_json"]) == file.content


async def test_an_unknown_link_is_a_404_that_says_how_long_images_are_kept(client):
    response = await client.get(PREFIX + "x.png")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"
    assert "3600 s" in response.json()["error"]["message"]


async def test_a_link_needs_no_key_and_is_in_no_log(connect, engine, caplog):
    caplog.set_level("DEBUG")
    async with connect(EngineSlot(engine), api_keys=("secret",)) as client:
        headers = {"Authorization": "Bearer secret"}
        answer = await client.post(URL, json={**BODY, "response_format": "url"}, headers=headers)
        url = answer.json()["data"][0]["url"]
        assert (await client.get(url)).status_code == 200
        assert (await client.get(PREFIX + "x.png")).status_code == 404
        assert (await client.post(url)).status_code == 405
    ours = [record for record in caplog.records if record.name.startswith("tetriserve")]
    assert any(f"GET {PREFIX}... 200" in record.getMessage() for record in ours)
    assert not any(url.rpartition("/")[2] in str(vars(record)) for record in ours)


async def test_links_end_after_their_time_and_their_memory_is_given_back(clock):
    links = Links(ttl_s=100.0)
    first = links.put(b"first", "image/png").removeprefix(PREFIX)
    await clock.pass_by(60.0)
    second = links.put(b"second", "image/webp").removeprefix(PREFIX)
    content, media_type, left_s = links.get(first)
    assert (content, media_type) == (b"first", "image/png")
    assert left_s == pytest.approx(40.0, abs=1.0)
    await clock.pass_by(41.0)
    assert links.num_bytes == len(b"second")  # nobody asked
    assert links.get(first) is None
    assert links.get(second)[0] == b"second"
    await clock.pass_by(60.0)
    assert links.num_bytes == 0


async def test_the_oldest_go_when_there_is_no_room(clock):
    links = Links(ttl_s=100.0, max_bytes=10)
    names = [links.put(bytes(4), "image/png").removeprefix(PREFIX) for _ in range(3)]
    assert [links.get(name) is not None for name in names] == [False, True, True]
    assert links.num_bytes == 8
    large = links.put(bytes(50), "image/png").removeprefix(PREFIX)
    assert links.get(large) is not None  # the newest is never given up
    assert links.num_bytes == 50


async def test_an_operator_can_switch_links_off(connect, engine):
    async with connect(EngineSlot(engine), api=ApiConfig(url_ttl_s=0)) as client:
        response = await client.post(URL, json={**BODY, "response_format": "url"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")
        assert "b64_json" in response.json()["error"]["message"]
    assert engine.state.trajectories == ()


async def test_a_stream_has_no_urls(client):
    response = await client.post(URL, json={**BODY, "response_format": "url", "stream": True})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")


async def test_what_a_journal_kept_is_served_by_url_again(connect, tmp_path):
    jobs = await make_journalled_jobs(FakeExecutor(takes_time=False), tmp_path)
    try:
        async with connect(EngineSlot(jobs.engine, jobs)) as client:
            body, headers = {**BODY, "response_format": "url"}, {"Idempotency-Key": "order-1"}
            first, second = [
                (await client.post(URL, json=body, headers=headers)).json()["data"][0]["url"] for _ in range(2)
            ]
            assert first != second
            assert (await client.get(first)).content == (await client.get(second)).content
    finally:
        await jobs.stop()


async def test_a_url_leads_to_the_server_that_was_asked(live):
    async with httpx.AsyncClient(base_url=await live.url, timeout=HANG_S) as http:
        answer = await http.post(URL, json={**BODY, "response_format": "url"})
        url = answer.json()["data"][0]["url"]
        assert url.startswith(await live.url + PREFIX)
        assert (await http.get(url)).content[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("headers", "start"),
    [
        ({"Host": "pictures.localhost"}, "http://pictures.localhost/v1/"),
        ({"Host": "pictures.localhost", "X-Forwarded-Proto": "https"}, "https://pictures.localhost/v1/"),
    ],
)
async def test_a_proxy_on_this_machine_may_say_by_which_name_and_scheme_it_was_called(live, headers, start):
    async with httpx.AsyncClient(base_url=await live.url, timeout=HANG_S) as http:
        answer = await http.post(URL, json={**BODY, "response_format": "url"}, headers=headers)
        assert answer.json()["data"][0]["url"].startswith(start)
