"""The board's stream: a snapshot, then every change once, whoever joins when, and however slow they read."""

from __future__ import annotations

import asyncio
import gc
import json
from contextlib import AsyncExitStack

import pytest
from fake_engine import BOTH, FAILING, FakeExecutor, make_engine

from tests.waiting import HANG_S
from tetriserve.core.errors import RequestFailed, ShuttingDown
from tetriserve.core.events import WorkerJoined, WorkerLost
from tetriserve.engine import Generation, VideoWish
from tetriserve.server import EngineSlot
from tetriserve.server.board import hub as board_hub
from tetriserve.server.board.hub import BoardHub
from tetriserve.server.board.router import MessageStream
from tetriserve.server.recent import RecentRuns
from tetriserve.server.slot import NotReady

SECRET = "a secret wish"


def hub_of(engine):
    slot = EngineSlot(engine)
    return BoardHub(slot, RecentRuns(slot))


@pytest.fixture
def hub(engine):
    return hub_of(engine)


@pytest.fixture
async def watch(hub):
    """Open a page. It is closed after the test, also after one that failed: its traceback would keep it open."""
    async with AsyncExitStack() as pages:

        def watch():
            messages = hub.watch()
            pages.push_async_callback(messages.aclose)
            return messages

        yield watch


async def following(messages):
    """The next event as (name, data)."""
    async with asyncio.timeout(HANG_S):
        name, data = (await anext(messages)).decode().rstrip("\n").split("\n")
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def changes_that(are_wanted, messages):
    """The next changes that are wanted. Others may come before them: the first plan comes at a moment of its own."""
    while True:
        name, changes = await following(messages)
        assert name == "changes"
        if are_wanted(changes):
            return changes


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


async def test_a_page_begins_with_the_whole_state(watch, engine):
    finished = await engine.generate(generation(request_id="first", slo_s=60.0))
    name, snapshot = await following(watch())
    assert name == "snapshot"
    (model,) = snapshot["models"]
    assert (model["name"], model["makes"], model["num_steps"], snapshot["policy"]) == ("tiny/flux", "image", 4, "fcfs")
    assert snapshot["ranks"] == [0, 1]
    assert model["sizes"][0] == "128x128"
    assert "fps" not in model
    assert (snapshot["requests"], snapshot["running"], snapshot["status"]) == ([], [], None)
    assert [row["stage"] for row in snapshot["ran"]] == [run.task.stage for run in finished.outcome.runs]
    (ended,) = snapshot["ended"]
    assert (ended["id"], ended["size"], ended["status"], ended["attained"]) == ("first", "64x64", "finished", True)
    assert {"model", "fps"}.isdisjoint(ended)


async def test_several_models_are_told_and_each_request_names_its_own():
    engine = make_engine(FakeExecutor(takes_time=False), cards=BOTH)
    messages = hub_of(engine).watch()
    try:
        _, snapshot = await following(messages)
        images, videos = snapshot["models"]
        assert (images["key"], images["name"], images["makes"]) == ("images", "tiny/flux", "image")
        assert (videos["key"], videos["name"], videos["makes"]) == ("videos", "tiny/wan", "video")
        assert videos["sizes"] == ["96x64x9", "64x64x5", "96x96x17"]
        assert (videos["num_steps"], videos["fps"], videos["frame_step"]) == (4, 8.0, 4)
        assert {"fps", "frame_step"}.isdisjoint(images)
        await engine.generate(generation(request_id="picture"))
        asked = generation(request_id="film", size="96x64", video=VideoWish(num_frames=13, fps=16.0))
        await engine.generate_video(asked)
        arrived = (await until_ended(messages, 2))["arrived"]
        said = [(row["id"], row["model"], row["size"], row.get("fps")) for row in arrived]
        assert said == [("picture", "images", "64x64", None), ("film", "videos", "96x64x13", 16.0)]
    finally:
        await messages.aclose()
        await engine.stop()


async def test_a_request_is_told_from_its_arrival_to_its_end(watch, engine):
    messages = watch()
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


async def test_a_task_that_runs_is_told_with_its_expected_end(watch, engine, executor):
    executor.gate.clear()
    messages = watch()
    await following(messages)
    drawing = asyncio.create_task(engine.generate(generation(request_id="first")))
    (running,) = (await changes_that(lambda changes: changes["running"], messages))["running"]
    (flight,) = engine.state.in_flight
    assert (running["id"], running["stage"], running["end_s"]) == ("first", "encode", round(flight.end_s, 4))
    executor.gate.set()
    await drawing


async def test_what_is_planned_is_told_while_someone_watches(watch, engine, executor):
    executor.gate.clear()
    messages = watch()
    await following(messages)
    drawing = asyncio.create_task(engine.generate(generation(request_id="first")))
    plan = (await changes_that(lambda changes: changes.get("plan", {}).get("runs"), messages))["plan"]
    assert [(row["id"], row["stage"]) for row in plan["runs"]] == [("first", "denoise"), ("first", "decode")]
    assert plan["finishes"] == {"first": plan["runs"][-1]["end_s"]}
    assert plan["runs"][0]["start_s"] > engine.state.in_flight[0].start_s
    assert (await following(watch()))[1]["plan"] == plan
    executor.gate.set()
    await drawing


async def test_what_happens_together_is_told_together(watch, engine, executor):
    executor.gate.clear()
    messages = watch()
    await following(messages)
    drawing = asyncio.create_task(engine.generate_all([generation(request_id=f"r{k}") for k in range(20)]))
    changes = await changes_that(lambda changes: "arrived" in changes, messages)
    assert [row["id"] for row in changes["arrived"]] == [f"r{k}" for k in range(20)]
    drawing.cancel()
    executor.gate.set()
    assert [row["status"] for row in (await until_ended(messages, 20))["ended"]] == ["cancelled"] * 20


async def test_prompts_are_never_told(watch, engine):
    messages = watch()
    text = await anext(messages)
    await engine.generate(generation())
    async with asyncio.timeout(HANG_S):
        while b'"status":"finished"' not in text:
            text += await anext(messages)
    text += await anext(watch())
    assert text.count(b'"status":"finished"') == 2
    assert b"secret" not in text


async def test_whoever_joins_in_the_middle_hears_everything_once(watch, engine):
    early = watch()
    await following(early)
    drawing = [asyncio.create_task(engine.generate(generation(request_id=f"r{k}"))) for k in range(6)]
    await drawing[2]
    late = watch()
    _, snapshot = await following(late)
    heard = await until_ended(late, 6 - len(snapshot["ended"]))
    everything = await until_ended(early, 6)

    def key(row):
        return row["id"], row["stage"], row["start_s"]

    assert 0 < len(snapshot["ran"]) < len(everything["ran"])
    assert sorted(map(key, snapshot["ran"] + heard["ran"])) == sorted(map(key, everything["ran"]))
    known = [row["id"] for row in snapshot["requests"] + snapshot["ended"] + heard["arrived"]]
    assert sorted(known) == [f"r{k}" for k in range(6)]


async def test_a_slow_page_holds_few_messages_and_begins_anew(hub, watch, engine, monkeypatch):
    monkeypatch.setattr(board_hub, "MAX_PENDING", 3)
    monkeypatch.setattr(board_hub, "FLUSH_S", 0.0)
    slow, quick = watch(), watch()
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


async def test_between_two_pages_nothing_is_collected(watch, engine):
    first = watch()
    await following(first)
    await first.aclose()
    await engine.generate(generation(request_id="unseen"))
    second = watch()
    _, snapshot = await following(second)
    assert [row["id"] for row in snapshot["ended"]] == ["unseen"]
    await engine.generate(generation(request_id="seen"))
    assert {row["id"] for row in (await until_ended(second))["ran"]} == {"seen"}


async def test_lost_and_joined_ranks_are_told(watch, engine):
    messages = watch()
    await following(messages)
    engine.handle(WorkerLost(1, "killed"))
    await changes_that(lambda changes: changes["ranks"] == [0], messages)
    engine.handle(WorkerJoined(1))
    await changes_that(lambda changes: changes["ranks"] == [0, 1], messages)


@pytest.mark.parametrize("number", [1, 2, 3])
async def test_a_page_that_leaves_while_it_is_sent_to_is_forgotten_at_once(hub, number):
    """While the head, the snapshot or the first changes are sent, of which it reads nothing."""
    num_sent, is_gone = 0, asyncio.Event()

    async def send(message):
        nonlocal num_sent
        num_sent += 1
        if num_sent == number:
            is_gone.set()
            await asyncio.Event().wait()

    async def receive():
        await is_gone.wait()
        return {"type": "http.disconnect"}

    gc.disable()  # which would find the page sooner or later
    try:
        await asyncio.wait_for(MessageStream(hub.watch())({"type": "http"}, receive, send), HANG_S)
        assert hub._watchers == set()
    finally:
        gc.enable()


async def test_a_task_without_a_result_says_so(watch, engine):
    messages = watch()
    await following(messages)
    with pytest.raises(RequestFailed):
        await engine.generate(generation(prompt=FAILING))
    seen = await until_ended(messages)
    assert [row.get("failure") for row in seen["ran"]] == [None, "step"]
    assert [row["status"] for row in seen["ended"]] == ["failed"]


async def test_silence_is_filled_with_comments(watch, monkeypatch):
    monkeypatch.setattr(board_hub, "KEEP_ALIVE_S", 0.01)
    messages = watch()
    await following(messages)
    told = {await asyncio.wait_for(anext(messages), HANG_S) for _ in range(3)}  # one of them is the first plan
    assert b": nothing new\n\n" in told


async def test_the_stream_ends_with_the_engine(hub, watch, engine):
    messages = watch()
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
