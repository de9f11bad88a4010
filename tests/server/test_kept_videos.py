"""Videos of a server with a journal: they outlive it, with their status, their files and their ids."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import BOTH, FAILING, FakeExecutor, make_journalled_jobs, video_file
from pictures_sent import PNG, data_url

from tests.waiting import until
from tetriserve.core.events import FailureKind
from tetriserve.core.stages import DECODE, ENCODE
from tetriserve.engine import JournalledJobs
from tetriserve.server import EngineSlot

URL = "/v1/videos"
BODY: dict[str, Any] = {
    "prompt": "a lighthouse",
    "size": "64x64",
    "num_frames": 10,
    "seed": 7,
    "num_inference_steps": 4,
}


class Life:
    """One life of a server with the journal."""

    def __init__(self, jobs: JournalledJobs, executor: FakeExecutor, client: httpx.AsyncClient) -> None:
        self.jobs, self.executor, self.client = jobs, executor, client

    async def create(self, key: str | None = None, **fields: Any) -> dict[str, Any]:
        headers = {} if key is None else {"Idempotency-Key": key}
        response = await self.client.post(URL, json=BODY | fields, headers=headers)
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def get(self, video_id: str) -> dict[str, Any]:
        response = await self.client.get(f"{URL}/{video_id}")
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def ended(self, video_id: str) -> dict[str, Any]:
        async with asyncio.timeout(120):
            while (video := await self.get(video_id))["status"] not in ("completed", "failed"):
                await asyncio.sleep(0.01)
        return video

    async def content(self, video_id: str, variant: str = "video") -> httpx.Response:
        return await self.client.get(f"{URL}/{video_id}/content", params={"variant": variant})

    async def listed(self) -> list[dict[str, Any]]:
        return list((await self.client.get(URL)).json()["data"])

    async def crash(self) -> None:
        """As a killed server leaves things."""
        await until(lambda: not self.jobs.journal.num_waiting)
        self.jobs.journal.close()
        await self.executor.stop()

    @property
    def num_made(self) -> int:
        return sum(command.task.stage == DECODE for command in self.executor.started)


Begin = Callable[..., Any]


@pytest.fixture
def begin(tmp_path: Path, connect: Callable[..., httpx.AsyncClient]) -> Begin:
    @asynccontextmanager
    async def begin(executor: FakeExecutor | None = None, **settings: Any) -> AsyncIterator[Life]:
        executor = executor or FakeExecutor()
        settings = {"cards": BOTH, "policy": "fixed:1"} | settings
        jobs = await make_journalled_jobs(executor, tmp_path / "j", **settings)
        async with connect(EngineSlot(jobs.engine, jobs)) as client:
            yield Life(jobs, executor, client)
        executor.gate.set()
        await jobs.stop()

    return begin


async def test_what_was_finished_is_there_after_a_restart_as_it_was(begin: Begin, tmp_path: Path) -> None:
    async with begin() as life:
        made, failed = await life.create(), await life.create(prompt=FAILING)
        before = [await life.ended(video["id"]) for video in (made, failed)]
        files = [(await life.content(made["id"], variant)).content for variant in ("video", "thumbnail")]
        assert {path.suffix for path in (tmp_path / "j" / "tensors").iterdir()} == {".mp4", ".jpg"}
        await life.crash()
    async with begin() as life:
        assert await life.listed() == before[::-1]
        assert [await life.get(video["id"]) for video in before] == before
        assert before[0]["warnings"] == ["num_frames: 10 was rounded to 9: tiny/wan makes 1 + a multiple of 4"]
        for variant, file in zip(("video", "thumbnail"), files, strict=True):
            assert (await life.content(made["id"], variant)).content == file
        assert (await life.content(failed["id"])).json()["error"]["code"] == "video_failed"
        assert life.executor.started == []
        remix = (await life.client.post(f"{URL}/{made['id']}/remix", json={"prompt": "a ship"})).json()
        assert (await life.ended(remix["id"]))["remixed_from_video_id"] == made["id"]


async def test_videos_of_a_model_that_is_not_served_any_more_are_kept_if_finished_and_failed_if_not(
    begin: Begin,
) -> None:
    async with begin() as life:
        made = await life.create()
        before = await life.ended(made["id"])
        life.executor.gate.clear()
        begun = await life.create(seed=8)
        await until(lambda: life.jobs.engine.state.in_flight)
        await life.crash()
    images, clips = BOTH
    other = dataclasses.replace(clips, key="films", name="films", fingerprint="f11")
    async with begin(cards=(images, other)) as life:
        assert await life.get(made["id"]) == before
        assert (await life.content(made["id"])).status_code == 200
        failed = await life.get(begun["id"])
        assert failed["status"] == "failed"
        assert failed["error"]["message"].startswith(
            f"it was accepted for the model '{clips.name}', with which this server was not started again"
        )
        remix = await life.client.post(f"{URL}/{made['id']}/remix", json={"prompt": "a ship"})
        assert remix.status_code == 404
        assert remix.json()["error"]["message"] == f"model '{clips.name}' is not served; served: 'films'"


async def test_what_a_killed_server_left_unfinished_goes_on_under_its_id(begin: Begin) -> None:
    executor = FakeExecutor()
    async with begin(executor, policy="tetriserve") as life:
        whole = await life.ended((await life.create())["id"])
        undisturbed = (await life.content(whole["id"])).content
        running, *beside = [await life.create(num_inference_steps=40, slo_ms=60_000) for _ in range(3)]
        await until(lambda: any(work.steps_done for work in works(executor, running)))
        executor.gate.clear()
        waiting = [await life.create(seed=seed) for seed in (8, 9)]
        (state,) = [each for each in life.jobs.engine.state.trajectories if each.request_id == name_of(running)]
        assert 0 < state.steps_done < 40
        await life.crash()

    executor = FakeExecutor()
    executor.gate.clear()
    async with begin(executor, policy="fcfs") as life:
        now = await life.get(running["id"])
        assert (now["status"], now["seed"]) == ("in_progress", 7)
        assert now["progress"] >= 100 * state.steps_done // 40
        made = [whole, running, *beside, *waiting]
        assert [video["id"] for video in await life.listed()] == [video["id"] for video in made[::-1]]
        assert [video["created_at"] for video in await life.listed()] == [video["created_at"] for video in made[::-1]]
        executor.gate.set()
        ends = [await life.ended(video["id"]) for video in (running, *waiting)]
        assert [end["status"] for end in ends] == ["completed"] * 3
        assert ends[0]["slo_ms"] == 60_000
        assert len(ends[0]["schedule"]["degrees"]) == 40
        assert (await life.content(running["id"])).content == undisturbed
        stages = [command.task.stage for command in executor.started if name_of(running) in command.task.members]
        assert ENCODE not in stages, "it was encoded in the first life"


async def test_what_was_deleted_stays_deleted(begin: Begin, tmp_path: Path) -> None:
    executor = FakeExecutor()
    async with begin(executor) as life:
        made = await life.ended((await life.create())["id"])
        executor.gate.clear()
        running = await life.create()
        for video in (made, running):
            assert (await life.client.delete(f"{URL}/{video['id']}")).json()["deleted"] is True
        assert await life.listed() == []
        executor.gate.set()
        await until(lambda: not life.jobs.engine.open_requests)
        await life.crash()
        assert list((tmp_path / "j" / "tensors").iterdir()) == []
    async with begin() as life:
        assert await life.listed() == []
        assert not life.jobs.engine.open_requests
        assert (await life.client.get(f"{URL}/{made['id']}")).status_code == 404


async def test_a_deletion_that_cannot_be_kept_is_refused_and_the_video_goes_on(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(changes: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    executor = FakeExecutor()
    executor.gate.clear()
    async with begin(executor) as life:
        video = await life.create()
        with monkeypatch.context() as patch:
            patch.setattr(life.jobs.journal._database, "apply", broken)
            response = await life.client.delete(f"{URL}/{video['id']}")
            assert (response.status_code, response.json()["error"]["code"]) == (503, "journal_unavailable")
        executor.gate.set()
        assert (await life.ended(video["id"]))["status"] == "completed"


async def test_the_same_key_is_the_same_video(begin: Begin) -> None:
    async with begin() as life:
        first = await life.create("order 1")
        again = await asyncio.gather(*(life.create("order 1", slo_ms=90_000) for _ in range(3)))
        assert {video["id"] for video in again} == {first["id"]}
        assert (await life.create("order 2"))["id"] != first["id"]
        await life.ended(first["id"])
        assert (await life.create("order 1"))["status"] == "completed"
        for url, body in ((URL, BODY | {"num_frames": 5}), ("/v1/images/generations", {"prompt": "a lighthouse"})):
            reused = await life.client.post(url, json=body, headers={"Idempotency-Key": "order 1"})
            assert (reused.status_code, reused.json()["error"]["code"]) == (422, "idempotency_key_reused")
        await life.crash()
    async with begin() as life:
        assert (await life.create("order 1"))["id"] == first["id"]
        sync = await life.client.post(f"{URL}/sync", json=BODY, headers={"Idempotency-Key": "order 1"})
        assert sync.content == (await life.content(first["id"])).content
        assert life.num_made <= 1, "of the other one, if it was not finished"


async def test_sync_with_a_key_is_a_job_that_outlives_its_client(begin: Begin) -> None:
    executor = FakeExecutor()
    executor.gate.clear()
    async with begin(executor) as life:
        headers = {"Idempotency-Key": "k"}
        call = asyncio.create_task(life.client.post(f"{URL}/sync", json=BODY, headers=headers))
        await until(lambda: executor.started)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        executor.gate.set()
        response = await life.client.post(f"{URL}/sync", json=BODY, headers=headers)
        assert response.headers["content-type"] == "video/mp4"
        assert response.content == video_file(executor.started[0].work[0].request).video
        assert life.num_made == 1
        assert len(await life.listed()) == 1


@pytest.mark.parametrize("variant", ["video", "thumbnail"])
async def test_a_damaged_file_is_not_given_away_and_the_video_is_made_again(
    begin: Begin, tmp_path: Path, variant: str
) -> None:
    async with begin() as life:
        video = await life.ended((await life.create())["id"])
        whole = (await life.content(video["id"], variant)).content
        suffix = {"video": ".mp4", "thumbnail": ".jpg"}[variant]
        (file,) = (path for path in (tmp_path / "j" / "tensors").iterdir() if path.suffix == suffix)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        response = await life.content(video["id"], variant)
        assert (response.status_code, response.json()["error"]["code"]) == (409, "video_not_ready")
        assert life.jobs.journal.corrupt["file"] >= 1
        assert (await life.ended(video["id"]))["seed"] == 7
        assert (await life.content(video["id"], variant)).content == whole
        assert life.num_made == 2


@pytest.mark.parametrize("kind", [FailureKind.LOST, FailureKind.MEMORY, FailureKind.STORE])
async def test_a_failure_that_was_told_is_not_taken_back_by_the_next_life(begin: Begin, kind: FailureKind) -> None:
    executor = FakeExecutor()
    executor.failure_kind = kind
    async with begin(executor) as life:
        failed = await life.ended((await life.create(prompt=FAILING))["id"])
        assert failed["status"] == "failed"
        await life.crash()
    async with begin() as life:
        assert await life.get(failed["id"]) == failed
        assert life.executor.started == []


async def test_a_file_that_the_disk_does_not_take_fails_the_video_until_the_next_life(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    async with begin() as life:
        monkeypatch.setattr(life.jobs.journal._directory, "write", refuse)
        video = await life.ended((await life.create())["id"])
        assert (video["status"], video["error"]["code"]) == ("failed", "journal_unavailable")
        assert life.num_made == 1
        await life.crash()
    async with begin() as life:
        assert (await life.ended(video["id"]))["status"] == "completed"


async def test_recovery_into_a_store_without_room_is_tried_again_when_its_client_asks(begin: Begin) -> None:
    executor = FakeExecutor()
    async with begin(executor) as life:
        executor.gate.clear()
        video = await life.create(input_reference=data_url(PNG))
        await life.crash()
    executor = FakeExecutor()
    executor.states.has_room = False
    async with begin(executor) as life:
        assert (await life.get(video["id"]))["status"] == "queued"
        assert (await life.get(video["id"]))["status"] == "queued"
        executor.states.has_room = True
        assert (await life.ended(video["id"]))["status"] == "completed"


async def test_a_picture_that_came_along_is_kept_until_the_video_is_made(begin: Begin, tmp_path: Path) -> None:
    executor = FakeExecutor()
    executor.gate.clear()
    async with begin(executor) as life:
        video = await life.create(input_reference=data_url(PNG))
        await life.crash()
    async with begin() as life:
        assert (await life.ended(video["id"]))["status"] == "completed"
        assert life.executor.started[0].work[0].request.images


async def test_a_stop_in_good_order_leaves_videos_to_the_next_life(begin: Begin) -> None:
    executor = FakeExecutor()
    executor.gate.clear()
    async with begin(executor) as life:
        video = await life.create()
        await life.jobs.stop(0.01)
    async with begin() as life:
        assert (await life.ended(video["id"]))["status"] == "completed"


async def test_the_bound_on_bytes_holds_after_a_restart(begin: Begin, tmp_path: Path) -> None:
    async with begin() as life:
        made = [await life.ended((await life.create(seed=seed))["id"]) for seed in range(4)]
        await life.crash()
    async with begin(max_video_bytes=1) as life:
        assert [video["id"] for video in await life.listed()] == [made[-1]["id"]]
        await until(lambda: len(list((tmp_path / "j" / "tensors").iterdir())) == 2)


async def test_videos_of_one_api_key_are_its_own_after_a_restart_in_whatever_order_keys_are(
    begin: Begin, connect: Callable[..., httpx.AsyncClient]
) -> None:
    async def ids(life: Life, order: tuple[str, ...], name: str, ask: Callable[..., Awaitable[httpx.Response]]) -> Any:
        async with connect(EngineSlot(life.jobs.engine, life.jobs), api_keys=order) as client:
            return (await ask(client, headers={"Authorization": f"Bearer {name}"})).json()

    async with begin() as life:
        adas = await ids(
            life, ("ada", "bob"), "ada", lambda client, headers: client.post(URL, json=BODY, headers=headers)
        )
        await life.crash()
    async with begin() as life:
        for name, expected in (("ada", [adas["id"]]), ("bob", [])):
            listed = await ids(life, ("bob", "ada"), name, lambda client, headers: client.get(URL, headers=headers))
            assert [video["id"] for video in listed["data"]] == expected


def works(executor: FakeExecutor, video: dict[str, Any]) -> list[Any]:
    return [work for command in executor.started for work in command.work if work.request.request_id == name_of(video)]


def name_of(video: dict[str, Any]) -> str:
    return str(video["id"]).removeprefix("video_")
