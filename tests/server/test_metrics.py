"""What the pool does, in numbers: how tasks went, what ranks did with their time, and that nothing is undocumented."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from fake_engine import ENCODE_S, FAILING, PROFILE, FakeExecutor, make_engine
from prometheus_client.parser import text_string_to_metric_families

from tests.waiting import until
from tetriserve.core.events import WorkerJoined, WorkerLost
from tetriserve.core.plan import InFlight, Plan, State, Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DENOISE, image_stages
from tetriserve.core.trajectory import Trajectory
from tetriserve.profile.cost import ProfileCost
from tetriserve.server import EngineSlot
from tetriserve.server.occupancy import RankTime

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "tetriserve.json"
DOCUMENT = ROOT / "docs" / "observability.md"

_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",), "info": ("_info",)}


async def families(client):
    return list(text_string_to_metric_families((await client.get("/metrics")).text))


async def samples(client):
    """By name and label values, but for the model's."""
    return {
        (sample.name, *(value for name, value in sample.labels.items() if name != "model")): sample.value
        for family in await families(client)
        for sample in family.samples
    }


async def test_tasks_are_counted_as_they_end(client, draw):
    assert (await draw(num_inference_steps=3)).status_code == 200
    assert (await draw(prompt=FAILING)).status_code == 500
    found = await samples(client)
    assert found["tetriserve_tasks_total", "finished", "encode"] == 2
    assert found["tetriserve_tasks_total", "finished", "denoise"] == 1
    assert found["tetriserve_tasks_total", "step", "denoise"] == 1
    assert found["tetriserve_tasks_total", "finished", "decode"] == 1
    assert found["tetriserve_steps_total", "2"] == 3
    assert found["tetriserve_step_time_ratio_count", "2"] == 1
    assert found["tetriserve_step_time_ratio_sum", "2"] == pytest.approx(1.0, rel=0.01)
    assert found["tetriserve_rank_seconds_total", "encode"] >= 2 * ENCODE_S
    assert found["tetriserve_request_stage_seconds_sum", "encode"] >= ENCODE_S
    assert found["tetriserve_request_stage_seconds_count", "denoise"] == 1
    assert found["tetriserve_finish_error_seconds_count", "64x64"] == 1


async def test_a_step_twice_as_long_as_expected_is_seen(connect):
    class Slow(FakeExecutor):
        def subscribe(self, on_event):
            super().subscribe(lambda event: on_event(_doubled(event)))

    def _doubled(event):
        return replace(event, elapsed_s=2 * event.elapsed_s) if hasattr(event, "elapsed_s") else event

    engine = make_engine(Slow())
    async with connect(EngineSlot(engine)) as client:
        body = {"prompt": "a lighthouse", "size": "64x64"}
        assert (await client.post("/v1/images/generations", json=body)).status_code == 200
        found = await samples(client)
    assert found["tetriserve_step_time_ratio_sum", "2"] == pytest.approx(2.0)
    assert found["tetriserve_step_time_ratio_bucket", "2", "1.5"] == 0
    await engine.stop()


async def test_refusals_are_counted_by_their_code(client, draw, engine, connect):
    assert (await draw(slo_ms=1, deadline_policy="reject")).status_code == 429
    assert (await draw(n=0)).status_code == 400
    found = await samples(client)
    assert found["tetriserve_http_requests_rejected_total", "deadline_infeasible"] == 1
    assert [key for key in found if key[0] == "tetriserve_http_requests_rejected_total"] == [
        ("tetriserve_http_requests_rejected_total", "deadline_infeasible")
    ]
    async with connect(EngineSlot(engine), api_keys=("one",)) as guarded:
        assert (await guarded.get("/v1/models")).status_code == 401
        assert (await samples(guarded))["tetriserve_http_requests_rejected_total", "invalid_api_key"] == 1
    async with connect(EngineSlot()) as early:
        assert (await early.get("/v1/models")).status_code == 503
        assert (await samples(early))["tetriserve_http_requests_rejected_total", "not_ready"] == 1


async def test_lost_workers_and_their_replacements_are_counted(client, engine):
    assert (await samples(client))["tetriserve_workers_restarted_total",] == 0
    engine.handle(WorkerLost(1, "its process ended"))
    found = await samples(client)
    assert (found["tetriserve_workers_lost_total",], found["tetriserve_workers_restarted_total",]) == (1, 0)
    assert found["tetriserve_ranks_up",] == 1
    engine.handle(WorkerJoined(1))
    assert (await samples(client))["tetriserve_workers_restarted_total",] == 1


def assert_sum(found, *, num_open):
    """Every admitted image is in one place."""
    ended = sum(value for key, value in found.items() if key[0] == "tetriserve_requests_total")
    admitted = sum(value for key, value in found.items() if key[0] == "tetriserve_requests_admitted_total")
    assert found["tetriserve_requests_open",] == num_open
    assert admitted == ended + num_open
    return admitted


async def test_admitted_images_are_those_that_finished_failed_were_cancelled_or_are_open(
    client, draw, executor, engine
):
    assert (await draw(slo_ms=1, deadline_policy="reject")).status_code == 429
    await asyncio.gather(draw(n=2), draw(prompt=FAILING))
    assert assert_sum(await samples(client), num_open=0) == 3

    executor.gate.clear()
    leaving, staying = (asyncio.create_task(draw(n=3, size=size)) for size in ("64x64", "80x64"))
    await until(lambda: engine.state.in_flight and len(engine.state.trajectories) == 6)
    assert_sum(await samples(client), num_open=6)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    num_left_running = 6 - int((await samples(client)).get(("tetriserve_requests_total", "64x64", "cancelled"), 0))
    assert num_left_running > 3  # the tasks of cancelled images that run are not over
    assert_sum(await samples(client), num_open=num_left_running)
    executor.gate.set()
    await staying
    found = await samples(client)
    assert assert_sum(found, num_open=0) == 9
    assert found["tetriserve_requests_total", "other", "finished"] == 3


async def test_the_sum_holds_when_the_engine_fails_and_when_it_stops(client, draw, executor, engine):
    executor.gate.clear()
    leaving, waiting = (asyncio.create_task(draw(seed=seed)) for seed in (1, 2))
    await until(lambda: len(engine.state.trajectories) == 2)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert_sum(await samples(client), num_open=2)
    engine.controller.policy = None  # a defect
    assert (await draw(seed=3)).status_code == 500
    assert (await waiting).status_code == 500
    found = await samples(client)
    assert assert_sum(found, num_open=0) == 3
    assert found["tetriserve_requests_total", "64x64", "cancelled"] == 1
    await engine.stop()
    assert assert_sum(await samples(client), num_open=0) == 3


async def test_an_observer_that_raises_is_counted_and_ends_no_request(client, draw, engine, monkeypatch):
    monkeypatch.setattr("tetriserve.server.metrics.Metrics._count_event", lambda self, event: {}[event])
    assert (await draw()).status_code == 200
    assert engine.failure is None
    found = await samples(client)
    assert found["tetriserve_observer_errors_total",] >= 4
    assert found["tetriserve_requests_total", "64x64", "finished"] == 1


class Widening:
    """One step on rank 0, one on rank 1, the rest on both, one request after the other."""

    def plan(self, state: State, now: float) -> Plan:
        if not state.waiting or len(state.idle_ranks) < 2:
            return Plan()
        trajectory = state.waiting[0]
        if trajectory.stage.kind != DENOISE:
            return Plan((Task((trajectory.request_id,), trajectory.stage.kind, (0,)),))
        ranks = [(0,), (1,), (0, 1)][min(trajectory.steps_done, 2)]
        return Plan((Task((trajectory.request_id,), DENOISE, ranks, 1),))


async def test_a_change_of_ranks_between_denoise_tasks_is_a_group_switch(client, draw, engine):
    await draw(num_inference_steps=4)
    assert (await samples(client))["tetriserve_group_switches_total",] == 0
    engine.controller.policy = Widening()
    await draw(num_inference_steps=4)
    found = await samples(client)
    assert found["tetriserve_group_switches_total",] == 2
    assert (found["tetriserve_steps_total", "1"], found["tetriserve_steps_total", "2"]) == (2, 4 + 2)


async def test_rank_time_goes_on_between_events(client, draw, executor, engine):
    executor.gate.clear()
    pending = asyncio.gather(draw(), draw())
    await until(lambda: len(engine.state.trajectories) == 2)
    before = await samples(client)
    await asyncio.sleep(0.05)
    after = await samples(client)
    (rank,) = engine.state.in_flight[0].task.ranks
    busy, idle = ("tetriserve_rank_busy_seconds_total", str(rank)), ("tetriserve_rank_idle_seconds_total", "waiting")
    busy_s, idle_s = (after[key] - before[key] for key in (busy, idle))
    assert busy_s == pytest.approx(idle_s)
    assert busy_s >= 0.05
    executor.gate.set()
    await pending


def test_rank_time_is_what_each_state_lasted():
    request = Request(
        request_id="a", prompt="", shape=Shape(64, 64), stages=image_stages(4), seed=0, arrival_s=0.0, deadline_s=9.0
    )
    running = replace(Trajectory.at(request, 1, 0), is_running=True)
    waiting = Trajectory(replace(request, request_id="b"))
    flight = InFlight(1, Task(("a",), DENOISE, (1, 2), 4), 0.0, 1.0)
    cost = ProfileCost(PROFILE)
    times = RankTime(10.0)
    times.advance(State((), (), (0, 1, 2, 3), cost), 11.0)
    times.advance(State((running,), (flight,), (0, 1, 2, 3), cost), 13.0)
    times.advance(State((running, waiting), (flight,), (0, 1, 2, 3), cost), 13.5)
    assert dict(times.busy_s) == {1: 2.5, 2: 2.5}
    assert times.idle_empty_s == 4 * 1.0 + 2 * 2.0
    assert times.idle_waiting_s == 2 * 0.5


def names_of(family):
    return {family.name + suffix for suffix in _SUFFIXES[family.type]}


async def test_every_query_of_the_dashboard_names_metrics_and_labels_that_exist(client, draw):
    await draw(n=2)
    await draw(slo_ms=1, deadline_policy="reject")
    exposed = await families(client)
    known = set().union(*(names_of(family) for family in exposed))
    labels = {name for family in exposed for sample in family.samples for name in sample.labels}
    queries = [
        target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel.get("targets", ())
    ]
    assert len(queries) > 15
    used = {name for query in queries for name in re.findall(r"\btetriserve_\w+", query)}
    assert used <= known
    groups = [group for query in queries for group in re.findall(r"\bby \(([^)]*)\)", query)]
    grouped = {name.strip() for group in groups for name in group.split(",")}
    selected = {name for query in queries for name in re.findall(r"[{,]\s*(\w+)\s*(?:=|!=|!~)", query)}
    assert grouped | selected <= labels


async def test_the_document_lists_every_metric_and_no_other(client, draw):
    await draw()
    exposed = set().union(
        *({name.removesuffix("_bucket") for name in names_of(family)} for family in await families(client))
    )
    exposed -= {name for name in exposed if name.endswith(("_count", "_sum", "_created"))}
    documented = set(re.findall(r"^\| `(tetriserve_\w+)", DOCUMENT.read_text(), re.MULTILINE))
    assert documented == exposed
