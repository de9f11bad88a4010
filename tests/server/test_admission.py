"""What the engine refuses or fails, as its clients see it."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fake_engine import FAILING, FakeExecutor, make_engine

from tests.waiting import HANG_S, until
from tetriserve.core.errors import ProfileError
from tetriserve.core.events import FailureKind
from tetriserve.server import EngineSlot

URL = "/v1/images/generations"
BODY = {"prompt": "a lighthouse", "size": "64x64"}


@pytest.fixture
async def small(executor, connect):
    """A server whose queue holds two."""
    engine = make_engine(executor, max_queue=2)
    async with connect(EngineSlot(engine)) as client:
        yield client, engine
    executor.gate.set()
    await engine.stop()


async def test_a_full_queue_is_a_429_with_retry_after_and_what_was_accepted_goes_on(small, executor):
    client, engine = small
    executor.gate.clear()
    accepted = []
    for number in range(3):  # one runs, two wait
        accepted.append(asyncio.create_task(client.post(URL, json=BODY)))
        await until(lambda number=number: len(engine.state.trajectories) == number + 1)

    refused = await client.post(URL, json=BODY)
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    error = refused.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "queue_full", None)
    assert "2" in error["message"]
    assert "earliest_deadline_ms" not in error

    executor.gate.set()
    assert [response.status_code for response in await asyncio.gather(*accepted)] == [200, 200, 200]
    assert (await client.post(URL, json=BODY)).status_code == 200


async def test_n_images_are_admitted_together_or_not_at_all(small, executor):
    client, engine = small
    response = await client.post(URL, json={**BODY, "n": 3})
    assert response.status_code == 429
    assert engine.state.trajectories == ()
    assert executor.forgotten == []


async def test_an_infeasible_deadline_is_refused_on_request_with_one_that_can_be_promised(draw):
    response = await draw(slo_ms=3, deadline_policy="reject")
    assert response.status_code == 429
    assert int(response.headers["Retry-After"]) >= 1
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "deadline_infeasible", "slo_ms")
    # Encode 2 ms, four steps of 0.625 ms at degree 2, decode 2 ms, 1 ms to start each; and what the quote itself takes.
    assert error["earliest_deadline_ms"] > 9.5
    assert f"one in {error['earliest_deadline_ms'] / 1000:.3f} s can" in error["message"]

    assert (await draw(slo_ms=3, deadline_policy="best_effort")).status_code == 200
    assert (await draw(slo_ms=60_000, deadline_policy="reject")).status_code == 200


async def test_a_failed_task_is_a_500_for_its_request_alone(draw):
    failing, fine = await asyncio.gather(draw(prompt=FAILING, request_id="doomed"), draw())
    assert fine.status_code == 200
    assert failing.status_code == 500
    assert failing.headers["X-Request-Id"] == "doomed"
    error = failing.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "generation_failed")
    assert "latents are not finite" in error["message"]


@pytest.mark.parametrize(
    ("kind", "status", "code", "should_retry"),
    [
        (FailureKind.STEP, 500, "generation_failed", "false"),
        (FailureKind.LOST, 500, "worker_lost", None),
        (FailureKind.MEMORY, 500, "out_of_memory", None),
        (FailureKind.STORE, 503, "store_unavailable", None),
    ],
)
async def test_a_client_is_told_whether_the_same_request_would_fail_again(
    draw, executor, kind, status, code, should_retry
):
    executor.failure_kind = kind
    answer = await draw(prompt=FAILING)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers.get("X-Should-Retry") == should_retry
    assert ("Retry-After" in answer.headers) == (status == 503)


@pytest.mark.parametrize("path", ["/dev/shm/tetriserve-store-a1/x.safetensors", "/srv/models/FLUX.1-dev"])
async def test_no_answer_names_a_path_of_the_server(draw, engine, path):
    class Broken:
        def plan(self, state, now):
            raise OSError(2, "No such file or directory", path)

    engine.controller.policy = Broken()
    answer = await draw()
    assert answer.status_code == 500
    assert "No such file or directory: '(path)'" in answer.json()["error"]["message"]
    assert path not in answer.text


async def test_a_defect_of_the_scheduler_is_no_fault_of_the_request(draw, engine):
    class Broken:
        def plan(self, state, now):
            raise ZeroDivisionError("a defect")

    engine.controller.policy = Broken()
    answer = await draw()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "X-Should-Retry" not in answer.headers


async def test_an_unforeseen_error_is_a_500_envelope_without_details_and_a_log_entry_with_the_id(
    draw, engine, monkeypatch, caplog
):
    async def broken(generations, watch):
        raise ZeroDivisionError("a secret path")

    monkeypatch.setattr(engine, "generate_all", broken)
    response = await draw(request_id="lost-1")
    assert response.status_code == 500
    assert response.headers["X-Request-Id"] == "lost-1"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "lost-1" in error["message"]
    assert "secret" not in response.text
    (record,) = [record for record in caplog.records if record.exc_info]
    assert "lost-1" in record.getMessage()
    assert "a secret path" in str(record.exc_info[1])


async def test_an_error_of_ours_without_a_mapping_is_a_500(draw, engine, monkeypatch):
    async def broken(generations, watch):
        raise ProfileError("profile has no row")

    monkeypatch.setattr(engine, "generate_all", broken)
    response = await draw()
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"


async def test_before_the_engine_is_there_work_is_refused_and_life_confirmed(connect, executor):
    slot = EngineSlot()
    async with connect(slot) as client:
        assert (await client.get("/health")).status_code == 200
        ready = await client.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["error"]["message"] == "starting: loading the model"
        for response in (await client.post(URL, json=BODY), await client.get("/v1/models")):
            assert response.status_code == 503
            assert int(response.headers["Retry-After"]) >= 1
            assert response.json()["error"]["code"] == "not_ready"
        assert "tetriserve_ready 0.0" in (await client.get("/metrics")).text

        engine = make_engine(executor)
        slot.put(engine)
        assert (await client.get("/ready")).status_code == 200
        assert (await client.post(URL, json=BODY)).status_code == 200
        assert "tetriserve_ready 1.0" in (await client.get("/metrics")).text
        await engine.stop()


async def test_while_shutting_down_new_work_is_refused_and_accepted_work_finished(client, engine, executor):
    executor.gate.clear()
    accepted = asyncio.create_task(client.post(URL, json=BODY))
    await until(lambda: engine.state.trajectories)
    stopping = asyncio.create_task(engine.stop(HANG_S))
    await asyncio.sleep(0)

    refused = await client.post(URL, json=BODY)
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["code"] == "shutting_down"
    ready = await client.get("/ready")
    assert (ready.status_code, ready.json()["error"]["message"]) == (503, "shutting down")
    assert (await client.get("/health")).status_code == 200

    executor.gate.set()
    assert (await accepted).status_code == 200
    await stopping
    assert executor.is_stopped


async def test_without_a_rank_the_server_is_alive_and_not_ready(connect):
    executor = FakeExecutor()
    executor.ranks = frozenset()
    engine = make_engine(executor)
    async with connect(EngineSlot(engine)) as client:
        response = await client.get("/ready")
        assert (response.status_code, response.json()["error"]["message"]) == (503, "no rank is up")
        assert (await client.get("/health")).status_code == 200
    await engine.stop()


async def test_many_requests_at_once_are_all_answered(draw):
    responses: list[httpx.Response] = await asyncio.gather(*(draw(seed=seed) for seed in range(40)))
    assert [response.json()["data"][0]["seed"] for response in responses] == list(range(40))
