"""A real server on a real port: clients that go away, the openai package, signals, launches that fail."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from fake_engine import CARD, FAILING, outcomes_of

from tests.waiting import HANG_S, until
from tetriserve.config import ServerConfig
from tetriserve.core.errors import CheckpointError, ConfigError
from tetriserve.core.stages import DECODE
from tetriserve.server import run, serve
from tetriserve.server.errors import RESTART_S
from tetriserve.server.run import listen, url_of

URL = "/v1/images/generations"
BODY = {"prompt": "a lighthouse", "size": "64x64"}
PNG = b"\x89PNG"


@pytest.fixture
async def http(live):
    async with httpx.AsyncClient(base_url=await live.url, timeout=HANG_S) as client:
        yield client


@pytest.fixture
async def ai(live):
    async with openai.AsyncOpenAI(base_url=f"{await live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_client_that_goes_away_frees_its_ranks_and_disturbs_nobody(live, http, executor):
    executor.gate.clear()
    ends = outcomes_of(live.engine)
    leaving = asyncio.create_task(http.post(URL, json={**BODY, "seed": 1}))
    await until(lambda: len(live.engine.state.in_flight) == 1)
    staying = asyncio.create_task(http.post(URL, json={**BODY, "seed": 2}))
    await until(lambda: len(live.engine.state.trajectories) == 2)

    leaving.cancel()
    await until(lambda: len(live.engine.state.trajectories) == 1)
    executor.gate.set()
    response = await staying
    assert response.status_code == 200
    assert response.json()["data"][0]["seed"] == 2
    assert [(end.request.seed, end.status.value) for end in ends] == [(1, "cancelled"), (2, "finished")]
    assert len(live.engine.state.idle_ranks) == 2
    assert set(executor.forgotten) == {end.request.request_id for end in ends}
    assert not [key for key in executor.states.bundles if f".{DECODE}." in key]
    assert 'status="499"} 1.0' in (await http.get("/metrics")).text


async def test_a_client_of_several_images_that_goes_away_cancels_them_all(live, http, executor):
    executor.gate.clear()
    leaving = asyncio.create_task(http.post(URL, json={**BODY, "n": 4}))
    await until(lambda: len(live.engine.state.trajectories) == 4)
    leaving.cancel()
    await until(lambda: not live.engine.state.trajectories)
    executor.gate.set()
    await until(lambda: len(executor.forgotten) == 4)


async def test_a_client_that_goes_away_while_it_sends_its_body_leaves_nothing(live, http):
    host, port = (await live.url).removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b'Content-Length: 100\r\n\r\n{"prompt": '
    )
    await writer.drain()
    writer.close()

    async def statuses():
        counted = re.findall(
            r'http_requests_total\{.*generations",status="(\d+)"\} 1.0', (await http.get("/metrics")).text
        )
        return sorted(counted)

    while not await statuses():
        await asyncio.sleep(0.01)
    assert await statuses() == ["499"]
    assert live.engine.state.trajectories == ()


async def test_the_openai_package_repeats_no_request_that_would_fail_again(live, executor):
    async with openai.AsyncOpenAI(base_url=f"{await live.url}/v1", api_key="none", max_retries=2) as client:
        with pytest.raises(openai.InternalServerError) as failed:
            await client.images.generate(prompt=FAILING, size="64x64")
    assert failed.value.code == "generation_failed"
    assert len({start.task.members for start in executor.started}) == 1


async def test_the_openai_package_draws(ai):
    answer = await ai.images.generate(
        prompt="a lighthouse",
        model=CARD.name,
        size="64x64",
        n=2,
        response_format="b64_json",
        user="ada",
        extra_body={"slo_ms": 60_000, "seed": 3, "num_inference_steps": 2, "negative_prompt": "fog"},
        extra_headers={"X-Request-Id": "from-openai"},
    )
    assert [base64.b64decode(item.b64_json)[:4] for item in answer.data] == [PNG, PNG]
    assert answer.data[1].seed == 4
    assert answer.data[0].schedule["attained"] is True
    assert len(answer.data[0].schedule["degrees"]) == 2
    assert answer._request_id == "from-openai"


async def test_the_openai_package_lists_models(ai):
    models = await ai.models.list()
    assert [model.id for model in models.data] == [CARD.name]
    assert (await ai.models.retrieve(CARD.name)).sizes == [str(size) for size in CARD.sizes]
    with pytest.raises(openai.NotFoundError):
        await ai.models.retrieve("dall-e-3")


async def test_the_openai_package_raises_its_own_errors(ai, executor, live):
    with pytest.raises(openai.BadRequestError) as bad:
        await ai.images.generate(prompt="a lighthouse", size="3x3")
    assert (bad.value.param, bad.value.code, bad.value.type) == ("size", "invalid_value", "invalid_request_error")
    assert "multiples of 16" in bad.value.message

    with pytest.raises(openai.RateLimitError) as late:
        await ai.images.generate(
            prompt="a lighthouse", size="64x64", extra_body={"slo_ms": 2, "deadline_policy": "reject"}
        )
    assert late.value.code == "deadline_infeasible"
    assert int(late.value.response.headers["retry-after"]) >= 1
    assert late.value.body["earliest_deadline_ms"] > 2

    executor.gate.clear()
    accepted = []
    for number in range(5):  # one runs, four wait
        accepted.append(asyncio.create_task(ai.images.generate(prompt="a lighthouse", size="64x64")))
        await until(lambda number=number: len(live.engine.state.trajectories) == number + 1)
    with pytest.raises(openai.RateLimitError) as full:
        await ai.images.generate(prompt="a lighthouse", size="64x64")
    assert full.value.code == "queue_full"
    executor.gate.set()
    await asyncio.gather(*accepted)


@pytest.fixture
def rest(monkeypatch):
    """Replaces the sleep of the openai package between two calls: waits for `rest.over`, and keeps how long it was to
    take."""

    async def sleep(seconds):
        sleep.seconds.append(seconds)
        await until(lambda: sleep.over)

    sleep.seconds, sleep.over = [], False
    monkeypatch.setattr("openai._base_client.anyio.sleep", sleep)
    return sleep


async def test_the_openai_package_comes_back_to_a_full_queue_when_it_is_told_to(live, executor, rest):
    executor.gate.clear()
    async with openai.AsyncOpenAI(base_url=f"{await live.url}/v1", api_key="none", max_retries=2) as ai:
        accepted = []
        for number in range(5):  # one runs, four wait
            accepted.append(asyncio.create_task(ai.images.generate(prompt="a lighthouse", size="64x64")))
            await until(lambda number=number: len(live.engine.state.trajectories) == number + 1)
        patient = asyncio.create_task(ai.images.generate(prompt="a lighthouse", size="64x64", extra_body={"seed": 9}))
        await until(lambda: rest.seconds)
        executor.gate.set()
        await asyncio.gather(*accepted)
        rest.over = True
        assert (await patient).data[0].seed == 9
        assert rest.seconds == [1.0], "Retry-After: 1"


def note_url(monkeypatch):
    """Holds `url` as soon as a server listens, before it is ready."""
    seen = {}

    def listen_and_tell(host, port):
        listener = listen(host, port)
        seen["url"] = url_of(listener)
        return listener

    monkeypatch.setattr(run, "listen", listen_and_tell)
    return seen


async def test_the_openai_package_comes_back_to_a_server_that_starts(start_live, monkeypatch, rest):
    seen = note_url(monkeypatch)
    launch = asyncio.Event()
    server = start_live(may_launch=launch)
    await until(lambda: seen)
    async with openai.AsyncOpenAI(base_url=f"{seen['url']}/v1", api_key="none", max_retries=2) as ai:
        drawing = asyncio.create_task(ai.images.generate(prompt="a lighthouse", size="64x64"))
        await until(lambda: rest.seconds)
        launch.set()
        await server.url
        rest.over = True
        answer = await drawing
    assert rest.seconds == [RESTART_S]
    assert base64.b64decode(answer.data[0].b64_json)[:4] == PNG
    assert await server.stop() == 0


async def test_the_port_is_open_while_the_engine_launches(start_live, monkeypatch):
    seen = note_url(monkeypatch)
    launch = asyncio.Event()
    server = start_live(may_launch=launch)
    await until(lambda: seen)
    async with httpx.AsyncClient(base_url=seen["url"], timeout=HANG_S) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 503
        assert (await client.post(URL, json=BODY)).status_code == 503
        launch.set()
        assert await server.url == seen["url"]
        assert (await client.get("/ready")).status_code == 200
    assert await server.stop() == 0


async def test_a_launch_that_fails_is_raised_and_the_port_is_free_again():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    async def launch():
        raise CheckpointError("no model here")

    with pytest.raises(CheckpointError, match="no model here"):
        await serve(ServerConfig(port=port), launch)
    listen("127.0.0.1", port).close()


async def test_a_port_in_use_is_one_clear_line_before_anything_is_launched():
    async def launch():
        raise AssertionError("launched all the same")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use.*--port") as error:
            await serve(ServerConfig(port=port), launch)
    assert "\n" not in str(error.value)


def test_an_accepted_connection_sends_small_packets_at_once():
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


async def test_while_it_serves_the_collector_does_not_walk_what_the_start_made(start_live):
    assert gc.get_freeze_count() == 0
    live = start_live()
    await live.url
    assert gc.get_freeze_count() > len(sys.modules)
    await live.stop()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize(("host", "start"), [("0.0.0.0", "http://127.0.0.1:"), ("127.0.0.1", "http://127.0.0.1:")])
def test_the_url_is_one_that_a_client_here_can_use(host, start):
    with listen(host, 0) as listener:
        assert url_of(listener).startswith(start)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "fe80::nonsense"])
def test_an_address_that_is_not_ours_is_a_config_error(host):
    with pytest.raises(ConfigError, match="--host"):
        listen(host, 0)


async def test_sigterm_lets_accepted_requests_finish_and_leads_to_0(start_live, executor):
    server = start_live()
    async with httpx.AsyncClient(base_url=await server.url, timeout=HANG_S) as client:
        executor.gate.clear()
        accepted = asyncio.create_task(client.post(URL, json=BODY))
        await until(lambda: server.engine.state.trajectories)
        signal.raise_signal(signal.SIGTERM)
        await until(lambda: not server.engine.is_ready)
        refused = await client.post(URL, json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200
        executor.gate.set()
        assert (await accepted).status_code == 200
        assert await server.serving == 0
    assert executor.is_stopped


async def test_requests_sent_as_the_stop_begins_are_refused_and_not_dropped(start_live, executor, monkeypatch):
    monkeypatch.setattr(run, "_REFUSALS_S", 3600.0)
    server = start_live()
    url = await server.url
    async with httpx.AsyncClient(base_url=url, timeout=HANG_S) as client:
        assert (await client.get("/health")).status_code == 200
        signal.raise_signal(signal.SIGTERM)
        await until(lambda: executor.is_stopped)
        for _ in range(5):
            kept, new = await asyncio.gather(
                client.post(URL, json=BODY), httpx.AsyncClient(timeout=HANG_S).post(url + URL, json=BODY)
            )
            for refused in (kept, new):
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
                assert refused.headers["Connection"] == "close"
            await asyncio.sleep(0.05)
    signal.raise_signal(signal.SIGTERM)
    assert await server.serving == 128 + signal.SIGTERM


async def test_requests_that_outlast_the_shutdown_timeout_are_answered_503(start_live, executor):
    server = start_live(shutdown_timeout_s=0.1)
    async with httpx.AsyncClient(base_url=await server.url, timeout=HANG_S) as client:
        executor.gate.clear()
        accepted = asyncio.create_task(client.post(URL, json=BODY))
        await until(lambda: server.engine.state.trajectories)
        signal.raise_signal(signal.SIGINT)
        response = await accepted
        assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
        assert await server.serving == 0


async def test_a_second_signal_ends_at_once(start_live, executor):
    server = start_live(shutdown_timeout_s=10 * HANG_S)
    async with httpx.AsyncClient(base_url=await server.url, timeout=HANG_S) as client:
        executor.gate.clear()
        accepted = asyncio.create_task(client.post(URL, json=BODY))
        await until(lambda: server.engine.state.trajectories)
        signal.raise_signal(signal.SIGTERM)
        await until(lambda: not server.engine.is_ready)
        signal.raise_signal(signal.SIGINT)
        assert await asyncio.wait_for(server.serving, HANG_S) == 128 + signal.SIGINT
        await asyncio.gather(accepted, return_exceptions=True)
    assert executor.is_stopped


async def test_a_signal_while_launching_stops_the_launch():
    is_launching = was_cancelled = False

    async def launch():
        nonlocal is_launching, was_cancelled
        is_launching = True
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            was_cancelled = True
            raise

    serving = asyncio.create_task(serve(ServerConfig(port=0), launch))
    await until(lambda: is_launching)
    signal.raise_signal(signal.SIGTERM)
    assert await asyncio.wait_for(serving, HANG_S) == 128 + signal.SIGTERM
    assert was_cancelled


async def test_one_server_after_another_on_the_same_port(start_live):
    first = start_live()
    url = await first.url
    async with httpx.AsyncClient(base_url=url, timeout=HANG_S) as client:
        assert (await client.post(URL, json=BODY)).status_code == 200
    assert await first.stop() == 0
    listen("127.0.0.1", int(url.rsplit(":", 1)[1])).close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_as_a_program_it_drains_on_a_signal(number):
    command = [sys.executable, str(Path(__file__).parent / "fake_engine.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout.readline() == "launching\n"
        url = program.stdout.readline().strip()
        body = {**BODY, "size": "256x256", "num_inference_steps": 100, "stream": True}
        with httpx.Client(base_url=url, timeout=HANG_S) as client:
            assert client.get("/ready").status_code == 200
            with client.stream("POST", URL, json=body) as answer:
                lines = answer.iter_lines()
                assert next(lines) == "event: image_generation.progress"
                program.send_signal(number)
                *_, last = (line for line in lines if line.startswith("data: "))
        assert program.wait(HANG_S) == 0
        log = program.stderr.read()
    assert len(json.loads(last.removeprefix("data: "))["schedule"]["degrees"]) == 100
    assert "Traceback" not in log
    assert "POST /v1/images/generations 200" in log
