"""Quotes over HTTP, and promises that admission keeps to."""

from __future__ import annotations

import asyncio

import pytest
from fake_engine import make_engine

from tests.waiting import until
from tetriserve.server import EngineSlot

URL = "/v1/quotes"
BODY = {"prompt": "a lighthouse", "size": "64x64"}


async def test_a_quote_says_what_could_be_promised_and_queues_nothing(client, engine, executor):
    response = await client.post(URL, json={**BODY, "slo_ms": 60_000, "n": 2, "num_inference_steps": 3})
    assert response.status_code == 200
    quote = response.json()
    assert quote["feasible"] is True
    assert quote["slo_ms"] == 60_000
    assert quote["queue_position"] == 0
    assert [image["degrees"] for image in quote["data"]] == [[2, 2, 2]] * 2
    first, second = (image["predicted_finish_ms"] for image in quote["data"])
    # Alone: encode 2 ms, three steps of 0.625 ms, decode 2 ms, 1 ms to start each; one after the other under fcfs.
    assert second - first == pytest.approx(8.875, abs=0.01)
    assert quote["predicted_finish_ms"] == second
    assert second <= quote["earliest_deadline_ms"] < 60_000
    assert quote["earliest_deadline_ms"] == int(quote["earliest_deadline_ms"])
    assert engine.state.trajectories == ()
    assert executor.forgotten == []


async def test_a_deadline_that_cannot_be_met_is_quoted_with_one_that_can(client):
    quote = (await client.post(URL, json=BODY, headers={"X-SLO-Ms": "3"})).json()
    assert quote["feasible"] is False
    assert quote["slo_ms"] == 3
    assert quote["earliest_deadline_ms"] >= quote["predicted_finish_ms"] > 3
    again = (await client.post(URL, json={**BODY, "slo_ms": quote["earliest_deadline_ms"] + 60_000})).json()
    assert again["feasible"] is True


async def test_the_queue_counts(client, engine, executor):
    executor.gate.clear()
    pictures = [asyncio.create_task(client.post("/v1/images/generations", json=BODY)) for _ in range(4)]
    await until(lambda: len(engine.state.trajectories) == 4)
    quote = (await client.post(URL, json={**BODY, "slo_ms": 60_000})).json()
    assert quote["queue_position"] == 3  # the fourth runs
    assert quote["predicted_finish_ms"] > 3 * 9.5
    executor.gate.set()
    await asyncio.gather(*pictures)


async def test_without_a_rank_nothing_is_promised(connect, executor):
    executor.ranks = frozenset()
    engine = make_engine(executor)
    async with connect(EngineSlot(engine)) as client:
        quote = (await client.post(URL, json=BODY)).json()
        assert (quote["feasible"], quote["predicted_finish_ms"], quote["earliest_deadline_ms"]) == (False, None, None)
        refused = await client.post("/v1/images/generations", json={**BODY, "deadline_policy": "reject"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "deadline_infeasible")
        assert "earliest_deadline_ms" not in refused.json()["error"]
        assert int(refused.headers["Retry-After"]) >= 1
    await engine.stop()


async def test_a_quote_is_refused_as_the_generation_would_be(client, engine):
    bad = await client.post(URL, json={**BODY, "size": "3x3"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "size")
    other = await client.post(URL, json={**BODY, "model": "dall-e-3"})
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
    await engine.stop()
    gone = await client.post(URL, json=BODY)
    assert (gone.status_code, gone.json()["error"]["code"]) == (503, "shutting_down")


async def test_a_quote_takes_one_image_out_of_the_rate(connect, engine):
    async with connect(EngineSlot(engine), rate_limit=3) as client:
        assert (await client.post(URL, json={**BODY, "n": 3})).status_code == 200
        assert (await client.post("/v1/images/generations", json={**BODY, "n": 2})).status_code == 200
        refused = await client.post(URL, json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")


async def test_of_many_who_ask_at_once_only_as_many_are_promised_as_can_be_kept(client, executor):
    executor.takes_time = False
    executor.gate.clear()
    # One after the other under fcfs, each call ten images of 200 steps of 10 ms on both ranks: 20 s.
    body = {**BODY, "size": "256x256", "n": 10, "num_inference_steps": 200, "slo_ms": 52_000}
    body["deadline_policy"] = "reject"
    calls = [asyncio.create_task(client.post("/v1/images/generations", json=body)) for _ in range(6)]
    await until(lambda: sum(call.done() for call in calls) == 4)
    executor.gate.set()
    responses = await asyncio.gather(*calls)
    assert sorted(response.status_code for response in responses) == [200] * 2 + [429] * 4


async def test_promises_are_counted_by_whether_they_were_kept(draw, client):
    assert (await draw(slo_ms=60_000, deadline_policy="reject")).status_code == 200
    assert (await draw(slo_ms=60_000)).status_code == 200
    text = (await client.get("/metrics")).text
    assert 'tetriserve_promises_total{end="kept",model="tiny/flux",size="64x64"} 1.0' in text
