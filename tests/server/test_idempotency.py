"""Requests under an idempotency key: done once, whatever becomes of the connection, and answered alike every time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from fake_engine import FAILING, MODEL, FakeExecutor, make_engine, make_journalled_jobs
from prometheus_client.parser import text_string_to_metric_families

from tests.waiting import HANG_S, until
from tetriserve.core.errors import RequestFailed, ShuttingDown
from tetriserve.core.events import FailureKind
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.engine import Generation, Jobs, JournalledJobs, LiveEngine
from tetriserve.journal import Journal, Key
from tetriserve.server import EngineSlot
from tetriserve.workload.outcome import Status

URL = "/v1/images/generations"
BODY = {"prompt": "a lighthouse", "size": "64x64"}

Ask = Callable[..., Awaitable[httpx.Response]]


@pytest.fixture
def calls(jobs: JournalledJobs, monkeypatch: pytest.MonkeyPatch) -> list[Key]:
    """The keys of all calls, as they come."""
    keys: list[Key] = []
    call = jobs.call

    def noted(key, *arguments):
        keys.append(key)
        return call(key, *arguments)

    monkeypatch.setattr(jobs, "call", noted)
    return keys


@pytest.fixture
async def jobs(executor: FakeExecutor, tmp_path: Path) -> AsyncIterator[JournalledJobs]:
    jobs = await make_journalled_jobs(executor, tmp_path / "journal", max_queue=8)
    yield jobs
    executor.gate.set()
    await jobs.stop()


@pytest.fixture
def engine(jobs: JournalledJobs) -> LiveEngine:
    return jobs.engine


@pytest.fixture
async def client(jobs: JournalledJobs, connect: Callable[..., httpx.AsyncClient]) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(slot_of(jobs)) as client:
        yield client


def slot_of(jobs: JournalledJobs) -> EngineSlot:
    return EngineSlot(jobs.engine, jobs)


@pytest.fixture
def ask(client: httpx.AsyncClient) -> Ask:
    async def ask(key: str = "k", **fields: object) -> httpx.Response:
        return await client.post(URL, json=BODY | fields, headers={"Idempotency-Key": key})

    return ask


def num_executed(executor: FakeExecutor) -> int:
    return sum(command.task.stage == DECODE for command in executor.started)


def items(response: httpx.Response) -> list[dict[str, object]]:
    assert response.status_code == 200, response.text
    return response.json()["data"]


def completed(response: httpx.Response) -> list[dict[str, object]]:
    """Images of a stream, as a plain answer would have them."""
    events = [json.loads(block.split("data: ", 1)[1]) for block in response.text.split("\n\n")[:-1]]
    images = [event for event in events if event["type"] == "image_generation.completed"]
    images.sort(key=lambda event: event["image_index"])
    return [{name: image[name] for name in ("b64_json", "seed", "schedule")} for image in images]


async def metric(client: httpx.AsyncClient, name: str, **labels: str) -> float:
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    (value,) = [s.value for f in families for s in f.samples if s.name == name and labels.items() <= s.labels.items()]
    return value


async def test_the_same_call_gets_the_same_images_and_is_executed_once(ask, executor, client):
    first = await ask(n=2)
    again = [await ask(n=2) for _ in range(2)]
    assert [items(response) for response in again] == [items(first)] * 2
    assert len({item["seed"] for item in items(first)}) == 2
    assert num_executed(executor) == 2
    assert await metric(client, "tetriserve_journal_replays_total") == 2
    assert await metric(client, "tetriserve_journal_entries", state="finished") == 1


async def test_another_key_is_another_request(ask, executor):
    (first,), (second,) = items(await ask("k")), items(await ask("l"))
    assert first["seed"] != second["seed"]
    assert num_executed(executor) == 2


async def test_concurrent_first_calls_are_executed_once(ask, executor):
    executor.gate.clear()
    calls = [asyncio.create_task(ask()) for _ in range(5)]
    await until(lambda: executor.started)
    executor.gate.set()
    answers = [items(response) for response in await asyncio.gather(*calls)]
    assert answers == [answers[0]] * 5
    assert num_executed(executor) == 1


@pytest.mark.parametrize(
    "field",
    [{"prompt": "a ship"}, {"size": "128x128"}, {"n": 2}, {"seed": 1}, {"num_inference_steps": 2},
     {"guidance_scale": 1.0}, {"negative_prompt": "fog"}],
    ids=lambda field: next(iter(field)),
)  # fmt: skip
async def test_a_key_stands_for_its_pictures_alone(ask, field):
    items(await ask())
    response = await ask(**field)
    assert response.status_code == 422
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("idempotency_key_reused", "Idempotency-Key")
    assert error["type"] == "invalid_request_error"
    assert "new one" in error["message"]


async def test_what_no_picture_depends_on_may_differ(ask, executor):
    first = items(await ask(slo_ms=60_000))
    assert items(await ask(slo_ms=100, priority=3, deadline_policy="reject", user="ada", request_id="r")) == first
    assert (await ask(output_format="jpeg")).json()["output_format"] == "jpeg"
    assert num_executed(executor) == 1


async def test_a_client_that_goes_away_cancels_nothing_and_finds_its_image_later(ask, executor, engine):
    executor.gate.clear()
    call = asyncio.create_task(ask(seed=7))
    await until(lambda: executor.started)
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call
    (trajectory,) = engine.state.trajectories
    executor.gate.set()
    await until(lambda: not engine.state.trajectories)
    assert items(await ask(seed=7))[0]["seed"] == 7
    assert [command.work[0].request for command in executor.started].count(trajectory.request) == len(executor.started)


async def test_a_stream_and_a_plain_answer_are_the_same_images(client, ask, executor):
    plain = items(await ask(n=2))
    streamed = await ask(n=2, stream=True)
    assert completed(streamed) == plain
    first = await ask("s", stream=True)
    assert [item["schedule"] for item in items(await ask("s"))] == [item["schedule"] for item in completed(first)]
    assert num_executed(executor) == 3


async def test_a_stream_joins_work_that_runs(ask, executor, calls):
    executor.gate.clear()
    plain = asyncio.create_task(ask())
    await until(lambda: executor.started)
    stream = asyncio.create_task(ask(stream=True))
    await until(lambda: len(calls) == 2)
    executor.gate.set()
    assert completed(await stream) == items(await plain)
    assert num_executed(executor) == 1


async def test_a_failure_is_an_answer_too(ask, executor, client):
    responses = [await ask(prompt=FAILING) for _ in range(3)]
    assert [response.status_code for response in responses] == [500] * 3
    assert {response.json()["error"]["message"] for response in responses} == {"latents are not finite"}
    assert {response.json()["error"]["code"] for response in responses} == {"generation_failed"}
    assert {response.headers["X-Should-Retry"] for response in responses} == {"false"}
    assert [command.task.stage for command in executor.started] == [ENCODE, DENOISE]
    assert await metric(client, "tetriserve_journal_entries", state="failed") == 1


@pytest.mark.parametrize(
    ("kind", "status"), [(FailureKind.LOST, 500), (FailureKind.MEMORY, 500), (FailureKind.STORE, 503)]
)
async def test_trouble_of_the_host_is_no_answer_and_the_next_call_gets_the_image(
    ask, executor, client, jobs, kind, status
):
    executor.failure_kind = kind
    for _ in range(2):
        assert (await ask(prompt=FAILING)).status_code == status
        await until(lambda: not jobs.journal.num_waiting)  # checkpoints are written when there is time
    assert await metric(client, "tetriserve_journal_entries", state="open") == 1
    (failed,) = {command.work[0].request.seed for command in executor.started}
    executor.failure_kind = None
    (image,) = items(await ask(prompt=FAILING))
    assert image["seed"] == failed
    assert items(await ask(prompt=FAILING)) == [image]
    assert [command.task.stage for command in executor.started].count(ENCODE) == 1, "it goes on where it was"
    assert await metric(client, "tetriserve_journal_entries", state="finished") == 1


async def test_an_image_that_the_host_cannot_read_is_made_again(ask, executor, monkeypatch):
    def unreadable(ref):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(executor.states, "get", unreadable)
        assert (await ask(seed=3)).status_code == 500
    assert items(await ask(seed=3))[0]["seed"] == 3


async def test_a_request_that_loses_its_workers_at_every_attempt_is_not_taken_up_for_ever(tmp_path):
    for _ in range(8):
        executor = FakeExecutor()
        executor.failure_kind = FailureKind.LOST
        jobs = await make_journalled_jobs(executor, tmp_path / "j", hold_s=0.0)
        with pytest.raises(RequestFailed) as caught:
            await jobs.call(Key("t", "k"), [Generation(prompt=FAILING, size="64x64")]).images()
        await jobs.stop()
    assert "each time at work for this request" in str(caught.value)
    assert jobs.count() == {"failed": 1}
    assert not executor.started


async def test_recovery_into_a_store_without_room_leaves_nothing_there_and_the_entry_open(tmp_path, connect, caplog):
    first = FakeExecutor()
    first.failure_kind = FailureKind.LOST
    jobs = await make_journalled_jobs(first, tmp_path / "j")
    body = BODY | {"prompt": FAILING, "n": 2}
    headers = {"Idempotency-Key": "k"}
    async with connect(slot_of(jobs)) as client:
        assert (await client.post(URL, json=body, headers=headers)).status_code == 500
    await jobs.stop()

    executor = FakeExecutor()
    executor.failure_kind = None
    executor.states.has_room = False
    jobs = await make_journalled_jobs(executor, tmp_path / "j")
    assert "was not taken up: the journal cannot be used: No space left on device" in caplog.text
    ids = {command.work[0].request.request_id for command in first.started}
    assert set(executor.forgotten) == ids
    assert jobs.num_resumed == jobs.num_steps_saved == 0
    async with connect(slot_of(jobs)) as client:
        answer = await client.post(URL, json=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "journal_unavailable")
        assert "/" not in answer.json()["error"]["message"]
        assert not executor.started
        executor.states.has_room = True
        assert len(items(await client.post(URL, json=body, headers=headers))) == 2
    assert {command.work[0].request.request_id for command in executor.started} == ids
    await jobs.stop()


async def test_a_refusal_leaves_the_key_free(ask, executor, engine):
    assert (await ask(size="65x64")).status_code == 400
    assert (await ask(slo_ms=0.001, deadline_policy="reject")).status_code == 429
    executor.gate.clear()
    crowd = [asyncio.create_task(ask(f"crowd {number}")) for number in range(10)]
    await until(lambda: len(engine.state.trajectories) >= 9)
    assert (await ask(n=9)).json()["error"]["code"] == "queue_full"
    executor.gate.set()
    await asyncio.gather(*crowd)
    assert len(items(await ask())) == 1


async def test_a_result_expires(executor, connect, tmp_path, monkeypatch):
    monkeypatch.setattr("tetriserve.engine.jobs._SWEEP_S", 0.01)
    wall_s = 1000.0
    jobs = await make_journalled_jobs(executor, tmp_path / "short", result_ttl_s=60.0, wall_clock=lambda: wall_s)
    async with connect(slot_of(jobs)) as client:
        headers = {"Idempotency-Key": "k"}
        first = items(await client.post(URL, json=BODY, headers=headers))
        assert list((tmp_path / "short" / "tensors").iterdir())
        wall_s += 61.0
        await until(lambda: not list((tmp_path / "short" / "tensors").iterdir()))
        other = await client.post(URL, json=BODY | {"prompt": "a ship"}, headers=headers)
        assert items(other) != first
        assert num_executed(executor) == 2
    await jobs.stop()


@pytest.mark.parametrize("key", ["", "x" * 129, "tab\there"])
async def test_a_key_that_is_none(client, key):
    response = await client.post(URL, json=BODY, headers={"Idempotency-Key": key})
    assert response.status_code == 400
    assert "allowed: 1 to 128 printable ASCII characters" in response.json()["error"]["message"]


@pytest.mark.parametrize("has_jobs", [False, True], ids=["without jobs", "with jobs in memory"])
async def test_without_a_journal_the_header_is_refused(executor, connect, engine, has_jobs):
    slot = EngineSlot(engine, Jobs(engine) if has_jobs else None)
    async with connect(slot) as client:
        response = await client.post(URL, json=BODY, headers={"Idempotency-Key": "k"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "Idempotency-Key"
    assert error["message"] == "Idempotency-Key needs a server with a journal: tetriserve serve --journal DIR"
    assert not executor.started


async def test_tenants_do_not_share_keys_whatever_the_order_of_api_keys(jobs, connect, executor):
    async def ask(client, api_key, **fields):
        headers = {"Authorization": f"Bearer {api_key}", "Idempotency-Key": "k"}
        return items(await client.post(URL, json=BODY | fields, headers=headers))

    async with connect(slot_of(jobs), api_keys=("ada", "bob")) as client:
        adas, bobs = await ask(client, "ada"), await ask(client, "bob", prompt="a ship")
    async with connect(slot_of(jobs), api_keys=("bob", "ada")) as client:
        assert await ask(client, "ada") == adas
        assert await ask(client, "bob", prompt="a ship") == bobs
    assert num_executed(executor) == 2


async def test_work_counts_as_its_clients_while_it_goes_on_and_retries_do_not(jobs, connect, executor, calls):
    async with connect(slot_of(jobs), max_concurrency=1) as client:
        executor.gate.clear()
        call = asyncio.create_task(client.post(URL, json=BODY, headers={"Idempotency-Key": "k"}))
        await until(lambda: executor.started)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        refused = await client.post(URL, json=BODY, headers={"Idempotency-Key": "other"})
        assert refused.json()["error"]["code"] == "concurrency_limit_exceeded"
        retry = asyncio.create_task(client.post(URL, json=BODY, headers={"Idempotency-Key": "k"}))
        await until(lambda: len(calls) == 2)
        executor.gate.set()
        items(await retry)
        items(await client.post(URL, json=BODY, headers={"Idempotency-Key": "other"}))


async def test_a_journal_that_cannot_be_written_promises_nothing(ask, jobs, executor, monkeypatch):
    def broken(changes):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(jobs.journal._database, "apply", broken)
        response = await ask()
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "journal_unavailable"
        assert "Retry-After" in response.headers
        assert not executor.started
    assert len(items(await ask())) == 1


async def test_an_image_that_cannot_be_kept_is_not_given_away(ask, jobs, executor, monkeypatch):
    def refuse(name, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(jobs.journal._directory, "write", refuse)
        assert (await ask(seed=3)).status_code == 503
    assert items(await ask(seed=3))[0]["seed"] == 3
    assert jobs.journal.num_errors >= 1


async def test_a_corrupt_result_is_made_again_with_the_same_seed(ask, executor, client, tmp_path):
    first = items(await ask())
    (file,) = (tmp_path / "journal" / "tensors").iterdir()
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    again = items(await ask())
    assert [(item["seed"], item["b64_json"]) for item in again] == [(i["seed"], i["b64_json"]) for i in first]
    assert num_executed(executor) == 2
    assert await metric(client, "tetriserve_journal_corrupt_total", kind="file") == 1
    assert items(await ask()) == again


async def test_work_that_a_stop_interrupts_is_finished_by_the_next_life(connect, tmp_path):
    first_life = FakeExecutor()
    jobs = await make_journalled_jobs(first_life, tmp_path / "j", policy="fixed:1")
    body = BODY | {"n": 2, "num_inference_steps": 4, "slo_ms": 60_000}
    async with connect(slot_of(jobs)) as client:
        call = asyncio.create_task(client.post(URL, json=body, headers={"Idempotency-Key": "k"}))
        await until(lambda: any(command.task.stage == DENOISE for command in first_life.started))
        first_life.gate.clear()
        await until(lambda: jobs.engine.state.in_flight)
        seeds = sorted(trajectory.request.seed for trajectory in jobs.engine.state.trajectories)
        ids = {trajectory.request_id for trajectory in jobs.engine.state.trajectories}
        await jobs.stop(0.01)
        response = await call
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "shutting_down"

    second_life = FakeExecutor()
    jobs = await make_journalled_jobs(second_life, tmp_path / "j", max_queue=1)
    assert {trajectory.request_id for trajectory in jobs.engine.state.trajectories} == ids
    async with connect(slot_of(jobs)) as client:
        answer = items(await client.post(URL, json=body, headers={"Idempotency-Key": "k"}))
        assert sorted(item["seed"] for item in answer) == seeds
        assert all(len(item["schedule"]["degrees"]) == 4 for item in answer)
        assert all(item["schedule"]["slo_ms"] == pytest.approx(60_000) for item in answer)
        assert await metric(client, "tetriserve_journal_resumed_total") == 2
        items(await client.post(URL, json=body, headers={"Idempotency-Key": "k"}))
    assert num_executed(second_life) == 2
    stages = {command.task.stage for command in second_life.started}
    assert ENCODE not in stages  # both were encoded in the first life
    encoded = {key.rpartition(".")[0] for key in second_life.states.bundles if key[0] != "."}
    assert encoded >= {f"{request_id}.encode.0" for request_id in ids}
    await jobs.stop()


async def crash(jobs: JournalledJobs, executor: FakeExecutor) -> None:
    """As a killed server leaves things: nobody is told, nothing is cleared up."""
    await until(lambda: not jobs.journal.num_waiting)
    jobs.journal.close()
    await executor.stop()


LIGHTHOUSE = [Generation(prompt="a lighthouse", size="64x64")]


async def crash_at_work(tmp_path: Path, *, times: int, hold_s: float = 30.0) -> None:
    """So many servers, one after the other, that go down as soon as a task of the request under key k has begun."""
    for _ in range(times):
        executor = FakeExecutor()
        executor.gate.clear()
        jobs = await make_journalled_jobs(executor, tmp_path / "j", hold_s=hold_s)
        jobs.call(Key("t", "k"), LIGHTHOUSE)
        await until(lambda executor=executor: executor.started)
        await crash(jobs, executor)


async def test_a_request_that_brings_the_server_down_again_and_again_is_tried_and_failed(tmp_path):
    await crash_at_work(tmp_path, times=4)
    await crash_at_work(tmp_path, times=1, hold_s=0.05)
    executor = FakeExecutor()
    jobs = await make_journalled_jobs(executor, tmp_path / "j")
    for _ in range(2):
        with pytest.raises(RequestFailed, match="the server or its workers went down 5 times, each time at work"):
            await jobs.call(Key("t", "k"), LIGHTHOUSE).images()
    assert not executor.started
    assert jobs.count() == {"failed": 1}
    await jobs.stop()


async def test_a_suspect_with_which_the_server_stands_gets_its_image(tmp_path):
    await crash_at_work(tmp_path, times=4)
    executor = FakeExecutor()
    jobs = await make_journalled_jobs(executor, tmp_path / "j", hold_s=0.2)
    waiting = asyncio.create_task(jobs.call(Key("t", "k"), LIGHTHOUSE).images())
    (other,) = await jobs.call(Key("t", "other"), LIGHTHOUSE).images()
    assert {command.work[0].request.request_id for command in executor.started} == {other.outcome.request.request_id}
    (image,) = await waiting
    assert image.outcome.status is Status.FINISHED
    await jobs.stop()


async def test_a_suspect_is_as_good_as_new_when_the_server_goes_down_without_it(tmp_path):
    for _ in range(3):
        await crash_at_work(tmp_path, times=4)
        executor = FakeExecutor()
        jobs = await make_journalled_jobs(executor, tmp_path / "j")
        assert not jobs.engine.state.trajectories
        await crash(jobs, executor)
    jobs = await make_journalled_jobs(FakeExecutor(), tmp_path / "j")
    (image,) = await jobs.call(Key("t", "k"), LIGHTHOUSE).images()
    assert image.outcome.status is Status.FINISHED
    await jobs.stop()


async def test_a_stop_does_not_wait_for_suspects_and_the_next_life_takes_them_up(tmp_path):
    await crash_at_work(tmp_path, times=4)
    jobs = await make_journalled_jobs(FakeExecutor(), tmp_path / "j")
    waiting = asyncio.create_task(jobs.call(Key("t", "k"), LIGHTHOUSE).images())
    await asyncio.sleep(0)
    async with asyncio.timeout(HANG_S):
        await jobs.stop(0.01)
    with pytest.raises(ShuttingDown):
        await waiting
    jobs = await make_journalled_jobs(FakeExecutor(), tmp_path / "j")
    assert len(await jobs.call(Key("t", "k"), LIGHTHOUSE).images()) == 1
    await jobs.stop()


async def test_who_only_waits_is_not_suspected(tmp_path):
    for life in range(4):
        executor = FakeExecutor()
        executor.gate.clear()
        jobs = await make_journalled_jobs(executor, tmp_path / "j", policy="fixed:2")
        if life == 0:
            for name in "ab":
                jobs.call(Key("t", name), [Generation(prompt=name, size="64x64")])
        await until(lambda executor=executor: executor.started)
        await crash(jobs, executor)
    executor = FakeExecutor()
    jobs = await make_journalled_jobs(executor, tmp_path / "j", policy="fixed:2")
    await until(lambda: not jobs.engine.state.trajectories)
    assert {command.work[0].request.prompt for command in executor.started} == {"b"}, "a held both ranks in every life"
    await jobs.stop()


async def test_deadlines_go_on_while_the_server_is_down(tmp_path, executor):
    wall_s = 1000.0
    first = FakeExecutor()
    first.gate.clear()
    jobs = JournalledJobs(
        make_engine(first), first, Journal(tmp_path / "j", MODEL), result_ttl_s=60.0, wall_clock=lambda: wall_s
    )
    jobs.call(Key("t", "k"), [Generation(prompt="p", size="64x64", slo_s=30.0)])
    await until(lambda: first.started)
    await crash(jobs, first)
    wall_s = 1020.0
    jobs = JournalledJobs(
        make_engine(executor), executor, Journal(tmp_path / "j", MODEL), result_ttl_s=60.0, wall_clock=lambda: wall_s
    )
    await jobs.recover()
    (trajectory,) = jobs.engine.state.trajectories
    arrival_s = trajectory.request.arrival_s
    assert trajectory.request.deadline_s == pytest.approx(arrival_s + 30.0)
    assert 0.0 <= arrival_s + 20.0 <= jobs.engine.now, "20 s before it was taken up"
    (image,) = await jobs.call(Key("t", "k"), [Generation(prompt="p", size="64x64")]).images()
    assert 20.0 < image.outcome.latency_s <= jobs.engine.now - arrival_s
    await jobs.stop()
