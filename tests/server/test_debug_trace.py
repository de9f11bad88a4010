"""`GET /debug/trace`: the last seconds as Perfetto draws them, within bounded memory."""

from __future__ import annotations

import asyncio

import pytest
from fake_engine import FAILING

from tests.waiting import until
from tetriserve.engine import Generation
from tetriserve.server import EngineSlot, recent


async def blocks(client, seconds=30):
    response = await client.get("/debug/trace", params={"seconds": seconds})
    assert response.status_code == 200
    events = response.json()["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert rows == {0: "rank 0", 1: "rank 1", 2: "deadlines"}
    return [event for event in events if event["ph"] == "X"], [event for event in events if event["ph"] == "i"]


async def test_ended_tasks_are_blocks_on_their_ranks_and_deadlines_are_marks(client, draw):
    answer = (await draw(size="64x64", num_inference_steps=3, slo_ms=60_000)).json()
    ran, marks = await blocks(client)
    schedule = answer["data"][0]["schedule"]
    assert [(block["cat"], block["tid"]) for block in ran] == [
        (run["stage"], rank) for run in schedule["runs"] for rank in run["ranks"]
    ]
    for block, duration_s in zip(
        ran, [run["end_s"] - run["start_s"] for run in schedule["runs"] for _ in run["ranks"]], strict=True
    ):
        assert block["dur"] == pytest.approx(duration_s * 1e6, abs=2)
    denoise = next(block for block in ran if block["cat"] == "denoise")
    assert denoise["args"]["steps"] == 3
    assert denoise["args"]["step_ms"] == pytest.approx(denoise["args"]["expected_step_ms"])
    (mark,) = marks
    assert mark["name"].endswith(" attained")


async def test_what_runs_now_is_shown_up_to_now(client, draw, engine, executor):
    executor.gate.clear()
    pending = asyncio.create_task(draw())
    await until(lambda: engine.state.in_flight)
    ran, marks = await blocks(client)
    assert [(block["cat"], block["args"]["end"]) for block in ran] == [("encode", "running")]
    assert marks == []
    executor.gate.set()
    await pending


async def test_failed_tasks_are_shown_and_prompts_are_not(client, draw):
    await draw(prompt=FAILING, negative_prompt="a secret wish")
    text = (await client.get("/debug/trace")).text
    assert '"end": "step"' in text
    assert FAILING not in text
    assert "wish" not in text


async def test_only_the_last_seconds_are_shown(client, draw):
    await draw()
    await asyncio.sleep(0.05)
    ran, marks = await blocks(client, seconds=0.04)
    assert (ran, marks) == ([], [])


async def test_what_is_kept_is_bounded(engine, connect, monkeypatch):
    monkeypatch.setattr(recent, "MAX_TASKS", 4)
    async with connect(EngineSlot(engine)) as client:
        for _ in range(3):
            await client.post("/v1/images/generations", json={"prompt": "a lighthouse", "size": "64x64"})
        events = (await client.get("/debug/trace")).json()["traceEvents"]
    assert len([event for event in events if event["ph"] == "X" and event["tid"] == 0]) == 4


async def test_the_tasks_of_an_image_keep_one_request_between_them(engine):
    kept = recent.RecentRuns(EngineSlot(engine))
    await engine.generate(Generation(prompt="a lighthouse", size="64x64", num_steps=4))
    excerpt = kept.last(30)
    assert len(excerpt.tasks) >= 3
    works = [work for ended in excerpt.tasks for work in ended.work]
    assert len(works) == len(excerpt.tasks)
    assert {id(work.request) for work in works} == {id(outcome.request) for outcome in excerpt.outcomes}
    assert {work.request.prompt for work in works} == {""}
    assert [ended.results for ended in excerpt.tasks] == [()] * len(excerpt.tasks)
    assert [work.states for work in works] == [{}] * len(works)


@pytest.mark.parametrize(("seconds", "hint"), [("0", "greater than 0"), ("301", "300"), ("x", "number")])
async def test_a_time_that_cannot_be_is_named(client, seconds, hint):
    response = await client.get("/debug/trace", params={"seconds": seconds})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "seconds"
    assert hint in response.json()["error"]["message"]


async def test_before_the_engine_is_there_is_a_503(connect):
    async with connect(EngineSlot()) as client:
        assert (await client.get("/debug/trace")).status_code == 503
