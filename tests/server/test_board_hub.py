"""The board's stream: a snapshot, then every change once, whoever joins when, and however slow they read."""

from __future__ import annotations

import asyncio
import json

import pytest
from fake_engine import FAILING

from tests.waiting import HANG_S
from tetriserve.core.errors import RequestFailed, ShuttingDown
from tetriserve.core.events import WorkerJoined, WorkerLost
from tetriserve.engine import Generation
from tetriserve.server import EngineSlot
from tetriserve.server.board import hub as board_hub
from tetriserve.server.board.hub import BoardHub
from tetriserve.server.recent import RecentRuns
from tetriserve.server.slot import NotReady

SECRET = "a secret wish"


def hub_of(engine):
    slot = EngineSlot(engine)
    return BoardHub(slot, RecentRuns(slot))


@pytest.fixture
def hub(engine):
    return hub_of(engine)


async def following(messages):
    """The next event as (name, data)."""
    name, data = (await asyncio.wait_for(anext(messages), HANG_S)).decode().rstrip("\n").split("\n")
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def until_ended(messages, num_requests=1):
    """All changes up to the end of so many requests, joined."""
    seen = {"arrived": [], "ran": [], "ended": [], "running": []}
    while len(seen["ended"]) < num_requests:
        name, changes = await following(messages)
        assert name == "changes"
        for kind, rows in seen.items():
            rows += changes.get(kind, [])
    return seen


def generation(**fields):
    return Generation(**{"prompt": SECRET, "negative_prompt": SECRET, "size": "64x64", "num_steps": 3, **fields})


async def test_a_page_begins_with_the_whole_state(hub, engine):
    finished = await engine.generate(generation(request_id="first", slo_s=60.0))
    name, snapshot = await following(hub.watch())
    assert name == "snapshot"
    assert (snapshot["model"], snapshot["policy"], snapshot["num_steps"]) == ("tiny/flux", "fcfs", 4)
    assert snapshot["ranks"] == [0, 1]
    assert snapshot["sizes"][0] == "128x128"
    assert (snapshot["requests"], snapshot["running"], snapshot["status"]) == ([], [], None)
    assert [row["stage"] for row in snapshot["ran"]] == [run.task.stage for run in finished.outcome.runs]
    (ended,) = snapshot["ended"]
    assert (ended["id"], ended["size"], ended["status"], ended["attained"]) == ("first", "64x64", "finished", True)


async def test_a_request_is_told_from_its_arrival_to_its_end(hub, engine):
    messages = hub.watch()
    await following(messages)
    finished = await engine.generate(generation(request_id="first", slo_s=1.0))
    seen = await until_ended(messages)
    (arrived,), (ended,) = seen["arrived"], seen["ended"]
    assert (arrived["id"], arrived["size"], arrived["num_steps"]) == ("first", "64x64", 3)
    assert arrived["deadline_s"] - arrived["arrival_s"] == pytest.approx(1.0, abs=1e-3)
    runs = finished.outcome.runs
    assert [row["stage"] for row in seen["ran"]] == [run.task.stage for run in runs]
    assert [row["ranks"] for row in seen["ran"]] == [list(run.task.ranks) for run in runs]
    assert sum(row["num_steps"] for row in seen["ran"]) == 3
    for row, run in zip(seen["ran"], runs, strict=True):
        assert (row["start_s"], row["end_s"]) == pytest.approx((run.start_s, run.end_s), abs=1e-4)
    assert ended["finish_s"] == pytest.approx(finished.outcome.finish_s, abs=1e-4)


async def test_a_task_that_runs_is_told_with_its_expected_end(hub, engine, executor):
    executor.gate.clear()
    messages = hub.watch()
    await following(messages)
    drawing = asyncio.create_task(engine.generate(generation(request_id="first")))
    _, changes = await following(messages)
    (running,) = changes["running"]
    (flight,) = engine.state.in_flight
    assert (running["id"], running["stage"], running["end_s"]) == ("first", "encode", round(flight.end_s, 4))
    executor.gate.set()
    await drawing


async def test_what_is_planned_is_told_while_someone_watches(hub, engine, executor):
    executor.gate.clear()
    messages = hub.watch()
    await following(messages)
    drawing = asyncio.create_task(engine.generate(generation(request_id="first")))
    while not (changes := (await following(messages))[1]).get("plan", {}).get("runs"):
        pass
    plan = changes["plan"]
    assert [(row["id"], row["stage"]) for row in plan["runs"]] == [("first", "denoise"), ("first", "decode")]
    assert plan["finishes"] == {"first": plan["runs"][-1]["end_s"]}
    assert plan["runs"][0]["start_s"] > engine.state.in_flight[0].start_s
    assert (await following(hub.watch()))[1]["plan"] == plan
    executor.gate.set()
    await drawing


async def test_what_happens_together_is_told_together(hub, engine, executor):
    executor.gate.clear()
    messages = hub.watch()
    await following(messages)
    drawing = asyncio.create_task(engine.generate_all([generation(request_id=f"r{k}") for k in range(20)]))
    _, changes = await following(messages)
    assert [row["id"] for row in changes["arrived"]] == [f"r{k}" for k in range(20)]
    drawing.cancel()
    executor.gate.set()
    assert [row["status"] for row in (await until_ended(messages, 20))["ended"]] == ["cancelled"] * 20


async def test_prompts_are_never_told(hub, engine):
    messages = hub.watch()
    text = [await anext(messages)]
    await engine.generate(generation())
    text += [await asyncio.wait_for(anext(messages), HANG_S)]
    text += [await anext(hub.watch())]
    assert b"changes" in text[1]
    assert not [part for part in text if b"secret" in part]


async def test_whoever_joins_in_the_middle_hears_everything_once(hub, engine):
    early = hub.watch()
    await following(early)
    drawing = [asyncio.create_task(engine.generate(generation(request_id=f"r{k}"))) for k in range(6)]
    await drawing[2]
    late = hub.watch()
    _, snapshot = await following(late)
    heard = await until_ended(late, 6 - len(snapshot["ended"]))
    everything = await until_ended(early, 6)

    def key(row):
        return row["id"], row["stage"], row["start_s"]

    assert 0 < len(snapshot["ran"]) < len(everything["ran"])
    assert sorted(map(key, snapshot["ran"] + heard["ran"])) == sorted(map(key, everything["ran"]))
    known = [row["id"] for row in snapshot["requests"] + snapshot["ended"] + heard["arrived"]]
    assert sorted(known) == [f"r{k}" for k in range(6)]


async def test_a_slow_page_holds_few_messages_and_begins_anew(hub, engine, monkeypatch):
    monkeypatch.setattr(board_hub, "MAX_PENDING", 3)
    monkeypatch.setattr(board_hub, "FLUSH_S", 0.0)
    slow, quick = hub.watch(), hub.watch()
    await following(slow)
    await following(quick)
    reading = asyncio.create_task(until_ended(quick, 5))
    for number in range(5):
        await engine.generate(generation(request_id=f"r{number}"))
    assert len((await reading)["ended"]) == 5
    assert max(len(watcher.pending) for watcher in hub._watchers) <= 3
    name, snapshot = await following(slow)
    assert name == "snapshot"
    assert [row["id"] for row in snapshot["ended"]] == [f"r{number}" for number in range(5)]
    reading = asyncio.create_task(until_ended(slow))
    await engine.generate(generation(request_id="last"))
    assert [row["id"] for row in (await reading)["ended"]] == ["last"]


async def test_between_two_pages_nothing_is_collected(hub, engine):
    first = hub.watch()
    await following(first)
    await first.aclose()
    await engine.generate(generation(request_id="unseen"))
    second = hub.watch()
    _, snapshot = await following(second)
    assert [row["id"] for row in snapshot["ended"]] == ["unseen"]
    await engine.generate(generation(request_id="seen"))
    assert {row["id"] for row in (await until_ended(second))["ran"]} == {"seen"}


async def test_lost_and_joined_ranks_are_told(hub, engine):
    messages = hub.watch()
    await following(messages)
    engine.handle(WorkerLost(1, "killed"))
    assert (await following(messages))[1]["ranks"] == [0]
    engine.handle(WorkerJoined(1))
    assert (await following(messages))[1]["ranks"] == [0, 1]


async def test_a_task_without_a_result_says_so(hub, engine):
    messages = hub.watch()
    await following(messages)
    with pytest.raises(RequestFailed):
        await engine.generate(generation(prompt=FAILING))
    seen = await until_ended(messages)
    assert [row.get("failure") for row in seen["ran"]] == [None, "step"]
    assert [row["status"] for row in seen["ended"]] == ["failed"]


async def test_silence_is_filled_with_comments(hub, monkeypatch):
    monkeypatch.setattr(board_hub, "KEEP_ALIVE_S", 0.01)
    messages = hub.watch()
    await following(messages)
    assert (await following(messages))[1]["plan"] == {"runs": [], "finishes": {}}
    assert await asyncio.wait_for(anext(messages), HANG_S) == b": nothing new\n\n"


async def test_the_stream_ends_with_the_engine(hub, engine):
    messages = hub.watch()
    await following(messages)
    await engine.stop()
    async with asyncio.timeout(HANG_S):
        assert [message async for message in messages if b"snapshot" in message] == []
    with pytest.raises(ShuttingDown):
        hub.watch()


async def test_before_the_engine_is_there_there_is_no_stream():
    slot = EngineSlot()
    with pytest.raises(NotReady):
        BoardHub(slot, RecentRuns(slot)).watch()
