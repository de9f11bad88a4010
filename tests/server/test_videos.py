"""`/v1/videos`: jobs with a status that is true, files on disk, and one clear answer to every mistake."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import zlib
from pathlib import Path

import pytest
from fake_engine import BOTH, CARD, FAILING, VIDEO_CARD, FakeExecutor, make_engine, outcomes_of, video_file
from pictures_sent import PNG, data_url, file_of, pixels_of
from PIL import Image
from safetensors.numpy import load

from tests.waiting import until
from tetriserve.core.events import FailureKind
from tetriserve.core.request import MP4, Shape
from tetriserve.core.stages import DECODE, DENOISE, INPUT
from tetriserve.engine import Jobs
from tetriserve.engine.progress import StoredVideo
from tetriserve.server import EngineSlot
from tetriserve.server.pictures import MAX_PIXELS
from tetriserve.workload.outcome import Status

URL = "/v1/videos"
BODY = {"prompt": "a lighthouse", "size": "64x64", "num_frames": 9, "seed": 7}


@pytest.fixture
async def engine(executor):
    engine = make_engine(executor, policy="fixed:1", cards=BOTH)
    yield engine
    executor.gate.set()
    await engine.stop()


@pytest.fixture
async def jobs(engine):
    jobs = Jobs(engine)
    yield jobs
    await jobs.stop()


@pytest.fixture
async def client(jobs, connect):
    async with connect(EngineSlot(jobs.engine, jobs)) as client:
        yield client


@pytest.fixture
def create(client):
    async def create(headers=None, **fields):
        response = await client.post(URL, json=BODY | fields, headers=headers)
        assert response.status_code == 200, response.text
        return response.json()

    return create


async def ended(client, video_id, **options):
    """The video once it is over."""

    async def look():
        response = await client.get(f"{URL}/{video_id}", **options)
        assert response.status_code == 200, response.text
        return response.json()

    async with asyncio.timeout(120):
        while (video := await look())["status"] not in ("completed", "failed"):
            await asyncio.sleep(0.01)
    return video


def error_of(response, param=None, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert "\n" not in error["message"]
    return error["message"]


async def test_a_video_is_queued_until_its_first_task_starts_and_then_its_progress_is_that_of_its_steps(
    create, client, executor, engine
):
    executor.gate.clear()
    for _ in range(2):
        await create(num_inference_steps=4)
    waiting = await create(num_inference_steps=4)
    assert (waiting["status"], waiting["progress"], waiting["completed_at"]) == ("queued", 0, None)
    assert (waiting["size"], waiting["num_frames"], waiting["fps"], waiting["seconds"]) == ("64x64", 9, 8.0, "1.125")
    assert (waiting["object"], waiting["model"], waiting["prompt"]) == ("video", "tiny/wan", "a lighthouse")
    assert waiting["remixed_from_video_id"] is waiting["error"] is waiting["expires_at"] is None
    seen = set()
    executor.gate.set()
    while (now := (await client.get(f"{URL}/{waiting['id']}")).json())["status"] != "completed":
        seen.add((now["status"], now["progress"]))
        await asyncio.sleep(0)
    assert {status for status, _ in seen} == {"queued", "in_progress"}
    assert {progress for status, progress in seen if status == "queued"} == {0}
    assert {progress for _, progress in seen} <= {0, 25, 50, 75, 99}
    assert now["progress"] == 100
    assert now["expires_at"] == pytest.approx(now["completed_at"] + 3600, abs=1)
    assert [run["stage"] for run in now["schedule"]["runs"]][-1] == DECODE
    assert len(now["schedule"]["degrees"]) == 4


async def test_within_one_long_task_progress_goes_by_the_time_that_steps_are_expected_to_take(create, client, executor):
    video = await create(num_inference_steps=5)
    await until(lambda: executor.started[-1].task.stage == DENOISE)
    executor.gate.clear()  # the task lasts longer than it is expected to
    assert executor.started[-1].task.num_steps == 5

    async def progress():
        return (await client.get(f"{URL}/{video['id']}")).json()["progress"]

    async with asyncio.timeout(120):
        while (now := await progress()) != 80:
            assert now in (0, 20, 40, 60)
            await asyncio.sleep(0.001)
    assert await progress() == 80, "the last step is over when the task is"


async def test_the_files_are_those_that_the_worker_left_and_are_on_disk_alone(create, client, engine, jobs):
    outcomes = outcomes_of(engine)
    video = await ended(client, (await create())["id"])
    request = outcomes[0].request
    assert (request.media_type, request.shape, request.model) == (MP4, Shape(64, 64, 9), "videos")
    expected = video_file(request)
    content = await client.get(f"{URL}/{video['id']}/content")
    assert (content.headers["content-type"], content.content) == ("video/mp4", expected.video)
    thumbnail = await client.get(f"{URL}/{video['id']}/content", params={"variant": "thumbnail"})
    assert (thumbnail.headers["content-type"], thumbnail.content) == ("image/jpeg", expected.thumbnail)
    assert Image.open(io.BytesIO(thumbnail.content)).size == (64, 64)
    (job,) = (known.job for known in jobs._known.values())
    (made,) = await job.outputs()
    assert isinstance(made.content, StoredVideo), "nothing in memory refers to the bytes"
    folder = made.content.video.path.parent
    assert {path.suffix for path in folder.iterdir() if path.name != "lock"} == {".mp4", ".jpg"}
    await jobs.stop()
    assert not folder.exists()


RANGES = [
    ("bytes=0-9", 206, slice(0, 10)), ("bytes=5-", 206, slice(5, None)), ("bytes=-7", 206, slice(-7, None)),
    ("bytes=0-", 200, slice(None)), ("bytes=0-999999999", 200, slice(None)), ("bytes=-999999999", 200, slice(None)),
    ("bytes=10-9", 200, slice(None)), ("bytes=0-1,4-5", 200, slice(None)), ("bytes=-", 200, slice(None)),
    ("pages=1-2", 200, slice(None)), ("bytes=999999999-", 416, None), ("bytes=-0", 416, None),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "status", "part"), RANGES)
async def test_players_get_the_part_that_they_ask_for(create, client, asked, status, part):
    video = await ended(client, (await create())["id"])
    whole = await client.get(f"{URL}/{video['id']}/content")
    assert whole.headers["accept-ranges"] == "bytes"
    response = await client.get(f"{URL}/{video['id']}/content", headers={"Range": asked})
    assert response.status_code == status
    size = len(whole.content)
    if part is None:
        assert response.json()["error"]["code"] == "invalid_range"
        assert response.headers["content-range"] == f"bytes */{size}"
        return
    assert response.content == whole.content[part]
    if status == 206:
        start, stop, _ = part.indices(size)
        assert response.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"


async def test_a_part_of_another_file_than_the_player_has_is_the_whole_of_this_one(create, client):
    video = await ended(client, (await create())["id"])
    url = f"{URL}/{video['id']}/content"
    whole = await client.get(url)
    for tag, status in ((whole.headers["etag"], 206), ('"other"', 200)):
        response = await client.get(url, headers={"Range": "bytes=0-9", "If-Range": tag})
        assert response.status_code == status


async def test_frames_that_are_rounded_are_said_in_the_object_and_beside_the_file(create, client):
    assert "warnings" not in await create()
    assert (await create(num_frames=10))["warnings"] == [
        "num_frames: 10 was rounded to 9: tiny/wan makes 1 + a multiple of 4"
    ]
    of_seconds = await create(num_frames=None, seconds="1")
    assert (of_seconds["num_frames"], of_seconds["seconds"]) == (9, "1.125")
    assert of_seconds["warnings"][0].startswith("seconds: 1 at 8 frames per second is 8 frames, which was rounded to 9")
    sync = await client.post(f"{URL}/sync", json=BODY | {"num_frames": 10, "user": "ada"})
    assert (sync.headers["x-num-frames"], sync.headers["x-seed"]) == ("9", "7")
    assert sync.headers["x-warnings"].startswith("user is ignored: videos are listed by API key; num_frames: 10 was")


async def test_forms_and_json_ask_for_the_same(create, client, engine):
    outcomes = outcomes_of(engine)
    fields = {
        "prompt": "a lighthouse", "width": 96, "height": 64, "num_frames": 13, "fps": 12.5, "num_inference_steps": 3,
        "guidance_scale": 2.5, "guidance_scale_2": 1.5, "boundary_ratio": 0.5, "flow_shift": 3, "seed": 5,
        "negative_prompt": "blur", "true_cfg_scale": 2, "slo_ms": 60000, "priority": -1, "model": "tiny/wan",
        "max_sequence_length": 32,
    }  # fmt: skip
    form = {name: str(value) for name, value in fields.items()} | {"degrees[]": ["1", "2"]}
    files = {name: (None, value) for name, value in form.items() if not isinstance(value, list)}
    multipart = [*files.items(), *(("degrees[]", (None, degree)) for degree in form["degrees[]"])]
    for response in (
        await client.post(URL, json=fields | {"degrees": [1, 2]}),
        await client.post(URL, files=multipart),
    ):
        assert response.status_code == 200, response.text
        await ended(client, response.json()["id"])
    first, second = (dataclasses.replace(each.request, request_id="", arrival_s=0, deadline_s=0) for each in outcomes)
    assert first == second
    assert (first.shape, first.degrees, first.num_steps, first.priority) == (Shape(64, 96, 13), (1, 2), 3, -1)
    options = first.video
    assert (options.fps, options.guidance_scale_2, options.boundary_ratio, options.flow_shift) == (12.5, 1.5, 0.5, 3)
    assert outcomes[0].request.deadline_s - outcomes[0].request.arrival_s == pytest.approx(60.0)


async def test_the_header_says_the_deadline_where_the_body_does_not_and_the_object_says_which(create):
    assert (await create(headers={"X-SLO-Ms": "90000"}))["slo_ms"] == 90_000
    assert (await create(headers={"X-SLO-Ms": "90000"}, slo_ms=50_000.5))["slo_ms"] == 50_000.5


REFERENCES = {
    "a file": {"files": {"input_reference": ("in.png", PNG, "image/png")}},
    "a data URL in a form": {"files": {"input_reference": (None, data_url(PNG))}},
    "an object in a form": {"files": {"input_reference[image_url]": (None, data_url(PNG))}},
    "an object": {"json": {"input_reference": {"image_url": data_url(PNG)}}},
    "a data URL": {"json": {"input_reference": data_url(PNG)}},
}


@pytest.mark.parametrize("name", REFERENCES)
async def test_a_picture_comes_along_however_it_is_sent(client, executor, name):
    reference = REFERENCES[name]
    if "json" in reference:
        response = await client.post(URL, json={"prompt": "a ship", **reference["json"]})
    else:
        response = await client.post(URL, data={"prompt": "a ship"}, **reference)
    assert response.status_code == 200, response.text
    video = await ended(client, response.json()["id"])
    assert video["status"] == "completed"
    work = executor.started[-1].work[0]
    assert work.request.images == (Shape(48, 80),)
    (pixels,) = load(executor.states.get(work.states[INPUT])).values()
    assert pixels.shape == (48, 80, 3)
    width, height = map(int, video["size"].split("x"))
    assert width > height, "as in the picture"


BAD = [
    ({"prompt": None}, "prompt", "string"),
    ({"prompt": "x" * 8001}, "prompt", "8000"),
    ({"num_frames": 0}, "num_frames", "num_frames is 0; allowed: 1 to 17"),
    ({"num_frames": 18}, "num_frames", "allowed: 1 to 17"),
    ({"num_frames": -5}, "num_frames", "allowed: 1 to 17"),
    ({"num_frames": 9.5}, "num_frames", "integer"),
    ({"num_frames": "9"}, "num_frames", "integer"),
    ({"seconds": "four"}, "seconds", "must be a number, or one as text such as '4'"),
    ({"seconds": "-1"}, "seconds", "must be a number"),
    ({"seconds": "1e3"}, "seconds", "must be a number"),
    ({"seconds": True}, "seconds", "must be a number"),
    ({"seconds": [4]}, "seconds", "number"),
    ({"num_frames": None, "seconds": 0}, "seconds", "seconds is 0; allowed: 0.125 to 2.12"),
    ({"num_frames": None, "seconds": -4}, "seconds", "seconds is -4; allowed"),
    ({"num_frames": None, "seconds": "12"}, "seconds", "seconds is 12; allowed: 0.125 to 2.12, which is"),
    ({"seconds": 2}, "seconds", "seconds is 2, which is 16 frames, and num_frames is 9; leave one out"),
    ({"fps": 0}, "fps", "fps is 0; allowed: 1 to 120"),
    ({"fps": 1000}, "fps", "allowed: 1 to 120"),
    ({"fps": "fast"}, "fps", "number"),
    ({"size": "64"}, "size", "WIDTHxHEIGHT"),
    ({"size": "63x64"}, "size", "multiples of 16"),
    ({"size": "1280x720"}, "size", "1280x720 with 9 frames is too large; allowed: from 64x64 with 5 frames to"),
    ({"size": "48x48"}, "size", "too small"),
    ({"size": None, "width": 64}, "height", "height is required beside width"),
    ({"width": 96, "height": 96}, "size", "leave one out"),
    ({"guidance_scale": 101}, "guidance_scale", "0.0 to 100.0"),
    ({"guidance_scale_2": -1}, "guidance_scale_2", "allowed: 0 to 100"),
    ({"boundary_ratio": 2}, "boundary_ratio", "allowed: 0 to 1"),
    ({"flow_shift": 0}, "flow_shift", "allowed: 0.01 to 100"),
    ({"num_inference_steps": 0}, "num_inference_steps", "1 to 200"),
    ({"seed": -2}, "seed", "-1 for any"),
    ({"slo_ms": 0}, "slo_ms", "above 0"),
    ({"degrees": [3]}, "degrees", "1, 2"),
    ({"model": "tiny/flux"}, "model", "model 'tiny/flux' does not make videos; served: 'tiny/wan'"),
    ({"model": "other"}, "model", "model 'other' is not served; served: 'tiny/wan'"),
    ({"lora": "style"}, "lora", "not served"),
    ({"n": 2}, "n", "served: 1"),
    ({"stream": True}, "stream", "a video is a job"),
    ({"quality": "hd"}, "quality", "unknown field 'quality'; allowed: "),
    ({"extra_args": "{"}, "extra_args", "JSON object"),
    ({"input_reference": "http://example.org/secret.png"}, "input_reference", "nothing is fetched"),
    ({"input_reference": {"file_id": "secret"}}, "input_reference", "data URL"),
    ({"input_reference": data_url(b"secret")}, "input_reference", "no whole png, jpeg or webp file"),
    ({"input_reference": [data_url(PNG)] * 2}, "image", "2 pictures came with the prompt; tiny/wan takes 0 to 1"),
    ({"input_reference": data_url(file_of(pixels_of(8, 80)))}, "image", "at least 16 pixels a side"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "hint"), BAD)
async def test_a_mistake_is_one_line_with_its_field_and_makes_no_job(client, executor, fields, param, hint, caplog):
    caplog.set_level("INFO")
    status = 404 if param == "model" else 400
    for url in (URL, f"{URL}/sync", "/v1/quotes"):
        said = BODY | ({"flow_shift": 5.0} if url == "/v1/quotes" else {}) | fields
        message = error_of(await client.post(url, json=said), param, status)
        assert hint in message
        assert "secret" not in message
    assert executor.started == []
    assert (await client.get(URL)).json()["data"] == []
    assert "secret" not in caplog.text


BAD_FORMS = [
    ("num_frames", "9.0", "integer"), ("num_frames", "nine", "integer"), ("num_frames", "", "integer"),
    ("fps", "NaN", "number"), ("seconds", "4s", "number"), ("size", "64x63", "multiples"), ("seed", "1e3", "integer"),
    ("prompt[]", "x", "given twice"), ("frames", "9", "unknown field"), ("flow_shift", "Infinity", "number"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "hint"), BAD_FORMS)
async def test_a_mistake_in_a_form_is_as_one_in_json(client, executor, field, value, hint):
    fields = {"prompt": "a ship", field: value}
    response = await client.post(URL, files={name: (None, text) for name, text in fields.items()})
    assert hint in error_of(response, field.removesuffix("[]"))
    assert executor.started == []


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
async def test_a_picture_that_is_too_large_is_refused(client):
    header = PNG[:16] + (30_000).to_bytes(4, "big") * 2 + PNG[24:29]
    file = header + zlib.crc32(header[12:]).to_bytes(4, "big") + PNG[33:]
    response = await client.post(URL, data={"prompt": "a ship"}, files={"input_reference": file})
    assert f"at most {MAX_PIXELS} pixels" in error_of(response, "input_reference")


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("text/plain", b"a ship"),
        ("application/json", b"{"),
        ("multipart/form-data", b"--x"),
        ("application/json", b"[]"),
    ],
)
async def test_a_body_that_is_none_is_refused(client, content_type, body):
    error_of(await client.post(URL, content=body, headers={"Content-Type": content_type}))


async def test_a_server_of_images_says_that_it_makes_no_videos_and_one_of_videos_no_images(executor, connect):
    async with connect(EngineSlot(make_engine(executor))) as client:
        message = error_of(await client.post(URL, json={"prompt": "a ship"}), "model", 404)
        assert message == "no model that makes videos is served"
        message = error_of(await client.post(URL, json={"prompt": "a ship", "model": CARD.name}), "model", 404)
        assert message == "model 'tiny/flux' does not make videos; served: none that makes videos"
    async with connect(EngineSlot(make_engine(executor, cards=[dataclasses.replace(VIDEO_CARD, key="")]))) as client:
        message = error_of(await client.post("/v1/images/generations", json={"prompt": "a ship"}), "model", 404)
        assert message == "no model that makes images is served"
        made = (await client.post(URL, json={"prompt": "a ship"})).json()
        assert (await ended(client, made["id"]))["status"] == "completed"


async def test_of_two_models_of_videos_the_one_that_takes_a_picture_gets_it_unless_another_is_named(executor, connect):
    cards = [
        dataclasses.replace(VIDEO_CARD, name=name, key=name, max_images=most) for name, most in (("t2v", 0), ("i2v", 1))
    ]
    async with connect(EngineSlot(make_engine(executor, cards=cards))) as client:
        for body, model in (({}, "t2v"), ({"input_reference": data_url(PNG)}, "i2v"), ({"model": "i2v"}, "i2v")):
            response = await client.post(URL, json={"prompt": "a ship", **body})
            assert response.status_code == 200, response.text
            video = await ended(client, response.json()["id"])
            assert (video["status"], video["model"]) == ("completed", model)
            assert executor.started[-1].work[0].request.model == model
        refused = await client.post(URL, json={"prompt": "a ship", "model": "t2v", "input_reference": data_url(PNG)})
        assert error_of(refused, "image") == "image: t2v takes no pictures"


async def test_content_before_it_is_ready_is_a_409_that_says_how_far_it_is(create, client, executor):
    executor.gate.clear()
    video = await create()
    for url in (f"{URL}/{video['id']}/content", f"{URL}/{video['id']}/content?variant=thumbnail"):
        response = await client.get(url)
        assert (
            error_of(response, status=409)
            == f"video {video['id']} is in_progress; its content needs it to be completed"
        )
        assert response.json()["error"]["code"] == "video_not_ready"
        assert response.headers["retry-after"] == "1"
    assert "spritesheet" in error_of(await client.get(f"{URL}/{video['id']}/content?variant=spritesheet"), "variant")


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (FailureKind.STEP, "generation_failed"),
        (FailureKind.LOST, "worker_lost"),
        (FailureKind.STORE, "store_unavailable"),
    ],
)
async def test_a_failure_is_told_by_status_and_content_and_stays_listed(create, client, executor, kind, code):
    executor.failure_kind = kind
    video = await ended(client, (await create(prompt=FAILING))["id"])
    assert video["status"] == "failed"
    assert video["error"]["code"] == code
    assert "latents are not finite" in video["error"]["message"]
    assert (video["completed_at"], video["predicted_finish_ms"]) == (None, None)
    assert video["expires_at"] > video["created_at"]
    assert "schedule" not in video
    response = await client.get(f"{URL}/{video['id']}/content")
    assert f"has failed ({code}): " in error_of(response, status=409)
    assert (response.json()["error"]["code"], response.headers["x-should-retry"]) == ("video_failed", "false")
    assert [each["id"] for each in (await client.get(URL)).json()["data"]] == [video["id"]]
    executor.failure_kind = None


async def test_deleting_a_video_that_runs_frees_its_ranks_when_its_task_ends(create, client, executor, engine):
    outcomes = outcomes_of(engine)
    executor.gate.clear()
    running, beside, waiting = [await create(num_inference_steps=4) for _ in range(3)]
    await until(lambda: len(executor.started) == 2)
    response = await client.delete(f"{URL}/{running['id']}")
    assert response.json() == {"id": running["id"], "object": "video.deleted", "deleted": True}
    executor.gate.set()
    await ended(client, waiting["id"])
    await ended(client, beside["id"])
    statuses = {outcome.request.request_id: outcome.status for outcome in outcomes}
    deleted_id = running["id"].removeprefix("video_")
    assert statuses.pop(deleted_id) is Status.CANCELLED
    assert set(statuses.values()) == {Status.FINISHED}
    tasks = [command for command in executor.started if command.work[0].request.request_id == deleted_id]
    assert len(tasks) == 1, "none of its tasks started after that"
    assert not engine.open_requests


async def test_what_was_deleted_is_gone_with_its_files(create, client, jobs):
    video = await ended(client, (await create())["id"])
    stored = jobs.videos(next(iter(jobs._videos))[0])[0].stored
    assert stored.video.path.exists()
    assert (await client.delete(f"{URL}/{video['id']}")).status_code == 200
    assert not stored.video.path.exists()
    assert not stored.thumbnail.path.exists()
    url = f"{URL}/{video['id']}"
    for response in (
        await client.delete(url), await client.get(url), await client.get(f"{url}/content"),
        await client.post(f"{url}/remix", json={"prompt": "a ship"}), await client.delete(f"{URL}/video_of_nobody"),
    ):  # fmt: skip
        assert "there is no video" in error_of(response, status=404)
        assert response.json()["error"]["code"] == "not_found"
    assert (await client.get(URL)).json()["data"] == []


async def test_a_failed_video_can_be_deleted(create, client):
    video = await ended(client, (await create(prompt=FAILING))["id"])
    assert (await client.delete(f"{URL}/{video['id']}")).json()["deleted"] is True
    assert (await client.get(f"{URL}/{video['id']}")).status_code == 404


async def test_a_file_is_sent_whole_though_its_video_is_deleted_meanwhile(create, client):
    video = await ended(client, (await create())["id"])
    whole = (await client.get(f"{URL}/{video['id']}/content")).content
    async with client.stream("GET", f"{URL}/{video['id']}/content") as response:
        assert (await client.delete(f"{URL}/{video['id']}")).status_code == 200
        assert b"".join([piece async for piece in response.aiter_bytes()]) == whole


async def test_keys_see_their_own_videos_alone(engine, jobs, connect):
    async with connect(EngineSlot(engine, jobs), api_keys=("ada", "bob")) as client:
        ada, bob = ({"Authorization": f"Bearer {key}"} for key in ("ada", "bob"))
        video = (await client.post(URL, json=BODY, headers=ada)).json()
        await ended(client, video["id"], headers=ada)
        url = f"{URL}/{video['id']}"
        for response in (
            await client.get(url, headers=bob), await client.get(f"{url}/content", headers=bob),
            await client.delete(url, headers=bob),
            await client.post(f"{url}/remix", json={"prompt": "a ship"}, headers=bob),
        ):  # fmt: skip
            error_of(response, status=404)
        assert (await client.get(URL, headers=bob)).json()["data"] == []
        assert len((await client.get(URL, headers=ada)).json()["data"]) == 1
        assert (await client.get(url)).status_code == 401


async def test_lists_come_in_pages_in_either_order(create, client):
    made = [(await create(seed=number))["id"] for number in range(5)]
    for order, expected in (("asc", made), ("desc", made[::-1])):
        first = (await client.get(URL, params={"order": order, "limit": 3})).json()
        assert [video["id"] for video in first["data"]] == expected[:3]
        assert (first["object"], first["has_more"], first["first_id"]) == ("list", True, expected[0])
        rest = (await client.get(URL, params={"order": order, "after": first["last_id"]})).json()
        assert [video["id"] for video in rest["data"]] == expected[3:]
        assert rest["has_more"] is False
    end = (await client.get(URL, params={"after": made[0]})).json()
    assert (end["data"], end["first_id"], end["last_id"], end["has_more"]) == ([], None, None, False)
    for name, value in (("after", "x"), ("limit", "0"), ("limit", "101"), ("order", "up")):
        error_of(await client.get(URL, params={name: value}), name)


async def test_a_remix_is_the_same_video_of_another_prompt(create, client, engine):
    outcomes = outcomes_of(engine)
    source = await create(
        num_frames=13, fps=4, num_inference_steps=3, flow_shift=2, negative_prompt="blur", degrees=[1]
    )
    early = await client.post(f"{URL}/{source['id']}/remix", json={"prompt": "a ship"})
    assert "a remix needs it to be completed" in error_of(early, status=409)
    await ended(client, source["id"])
    remix = (await client.post(f"{URL}/{source['id']}/remix", json={"prompt": "a ship", "slo_ms": 50_000})).json()
    assert (remix["remixed_from_video_id"], remix["prompt"], remix["seed"]) == (source["id"], "a ship", 7)
    assert (remix["size"], remix["num_frames"], remix["fps"], remix["slo_ms"]) == ("64x64", 13, 4.0, 50_000)
    assert (await ended(client, remix["id"]))["status"] == "completed"
    other = (await client.post(f"{URL}/{source['id']}/remix", json={"prompt": "a ship", "seed": 8})).json()
    assert (other["seed"], other["id"] != remix["id"]) == (8, True)
    alike = {"request_id": "", "prompt": "", "arrival_s": 0, "deadline_s": 0}
    first, second = (dataclasses.replace(outcome.request, **alike) for outcome in outcomes[:2])
    assert first == second
    bad = (({}, "prompt"), ({"prompt": "x", "size": "64x64"}, "size"), ({"prompt": "x", "seed": -2}, "seed"))
    for body, param in bad:
        error_of(await client.post(f"{URL}/{source['id']}/remix", json=body), param)


async def test_a_video_that_was_made_from_a_picture_cannot_be_remixed(client):
    video = (await client.post(URL, json={"prompt": "a ship", "input_reference": data_url(PNG)})).json()
    await ended(client, video["id"])
    response = await client.post(f"{URL}/{video['id']}/remix", json={"prompt": "a boat"})
    assert "was made from a picture, which is not kept" in error_of(response)


async def test_finished_and_failed_videos_expire(executor, engine, connect):
    wall_s = 1000.0
    jobs = Jobs(engine, result_ttl_s=60.0, wall_clock=lambda: wall_s)
    async with connect(EngineSlot(engine, jobs)) as client:
        made = [(await client.post(URL, json=BODY | {"prompt": prompt})).json() for prompt in ("a ship", FAILING)]
        videos = [await ended(client, video["id"]) for video in made]
        assert [video["expires_at"] for video in videos] == [1060, 1060]
        stored = jobs._videos[next(iter(jobs._videos))].stored
        wall_s = 1061.0
        for video in videos:
            assert "are kept for 60 s" in error_of(await client.get(f"{URL}/{video['id']}"), status=404)
        assert (await client.get(URL)).json()["data"] == []
        assert not stored.video.path.exists()
    await jobs.stop()


async def test_the_oldest_videos_go_where_all_have_too_many_bytes(engine, connect, caplog):
    caplog.set_level("INFO")
    jobs = Jobs(engine, max_video_bytes=8_000)
    async with connect(EngineSlot(engine, jobs)) as client:
        made = []
        for number in range(6):
            made.append((await client.post(URL, json=BODY | {"seed": number})).json()["id"])
            await ended(client, made[-1])
        kept = [video["id"] for video in (await client.get(URL, params={"order": "asc"})).json()["data"]]
        assert kept == made[-len(kept) :]
        assert 1 <= len(kept) < 6
        assert sum(video.num_bytes for video in jobs._videos.values()) <= 8_000
        assert "at most 8000 bytes" in error_of(await client.get(f"{URL}/{made[0]}"), status=404)
        assert f"video {made[0]} is given up before its time" in caplog.text
    await jobs.stop()


async def test_without_room_for_its_file_a_video_fails_alone(create, client, monkeypatch):
    def refuse(path, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", refuse)
        video = await ended(client, (await create())["id"])
    assert video["error"] == {
        "code": "store_unavailable", "message": "there is no room for the finished video: No space left on device"
    }  # fmt: skip
    assert (await ended(client, (await create())["id"]))["status"] == "completed"


async def test_a_video_whose_file_was_removed_from_the_host_has_failed(create, client, jobs):
    video = await ended(client, (await create())["id"])
    next(iter(jobs._videos.values())).stored.video.path.unlink()
    response = await client.get(f"{URL}/{video['id']}/content")
    assert "its file was removed from the server" in error_of(response, status=409)
    assert (await client.get(f"{URL}/{video['id']}")).json()["error"]["code"] == "internal_error"


async def test_videos_count_in_the_limits_of_their_key(engine, jobs, executor, connect):
    executor.gate.clear()
    async with connect(EngineSlot(engine, jobs), max_concurrency=1) as client:
        video = (await client.post(URL, json=BODY)).json()
        for url in (URL, f"{URL}/sync", "/v1/images/generations"):
            body = {"prompt": "a ship", "size": "64x64"}
            assert (await client.post(url, json=body)).json()["error"]["code"] == "concurrency_limit_exceeded"
        assert (await client.delete(f"{URL}/{video['id']}")).status_code == 200
        assert (await client.post(URL, json=BODY)).status_code == 200
    executor.gate.set()
    async with connect(EngineSlot(engine, jobs), rate_limit=2) as client:
        assert (await client.post(URL, json=BODY)).status_code == 200
        assert (await client.post(f"{URL}/sync", json=BODY)).status_code == 200
        refused = await client.post(URL, json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")


async def test_a_deadline_that_cannot_be_promised_is_refused_and_leaves_no_job(client, executor):
    response = await client.post(URL, json=BODY | {"slo_ms": 0.5, "deadline_policy": "reject"})
    assert (response.status_code, response.json()["error"]["code"]) == (429, "deadline_infeasible")
    assert response.json()["error"]["earliest_deadline_ms"] > 0.5
    assert (await client.get(URL)).json()["data"] == []
    assert executor.started == []


async def test_a_full_queue_refuses_a_video(executor, connect):
    executor.gate.clear()
    engine = make_engine(executor, max_queue=1, cards=BOTH, policy="fixed:2")
    jobs = Jobs(engine)
    async with connect(EngineSlot(engine, jobs)) as client:
        answers = [await client.post(URL, json=BODY) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[-1].json()["error"]["code"] == "queue_full"
        assert len((await client.get(URL)).json()["data"]) == 2
    executor.gate.set()
    await jobs.stop(5)


async def test_an_idempotency_key_needs_a_journal(client):
    for url in (URL, f"{URL}/sync"):
        response = await client.post(url, json=BODY, headers={"Idempotency-Key": "k"})
        assert "needs a server with a journal" in error_of(response, "Idempotency-Key")


async def test_sync_answers_with_the_file_or_with_an_error_in_the_envelope(client, engine):
    outcomes = outcomes_of(engine)
    response = await client.post(f"{URL}/sync", json=BODY)
    assert (response.status_code, response.headers["content-type"]) == (200, "video/mp4")
    assert response.content == video_file(outcomes[0].request).video
    failed = await client.post(f"{URL}/sync", json=BODY | {"prompt": FAILING})
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "generation_failed")
    assert (await client.get(URL)).json()["data"] == [], "it leaves no job"


async def test_a_client_of_sync_that_goes_away_cancels_its_video(start_live, executor):
    live = start_live(cards=BOTH)
    host, port = (await live.url).removeprefix("http://").split(":")
    outcomes = outcomes_of(live.engine)
    executor.gate.clear()
    _, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(BODY).encode()
    head = [
        f"POST {URL}/sync HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    writer.write("\r\n".join([*head, "", ""]).encode() + body)
    await until(lambda: executor.started)
    writer.close()
    await until(lambda: not live.engine._clients)
    executor.gate.set()
    await until(lambda: outcomes)
    assert outcomes[0].status is Status.CANCELLED
    assert DENOISE not in {command.task.stage for command in executor.started}


async def test_polls_are_spread_over_the_time_that_is_left(create, client, executor, engine, monkeypatch):
    executor.gate.clear()
    video = await create()

    async def forecast_in(seconds):
        real = await engine.forecast()
        finish_s = engine.now + seconds
        forecast = dataclasses.replace(real, finish_s={video["id"].removeprefix("video_"): finish_s})

        async def told():
            return forecast

        monkeypatch.setattr(engine, "forecast", told)
        return await client.get(f"{URL}/{video['id']}")

    real = engine.forecast
    for seconds, header in ((0.2, 100), (30.0, 3000), (900.0, 10_000)):
        response = await forecast_in(seconds)
        assert int(response.headers["openai-poll-after-ms"]) == pytest.approx(header, rel=0.1)
        assert response.json()["predicted_finish_ms"] == pytest.approx(seconds * 1000, rel=0.5)
        monkeypatch.setattr(engine, "forecast", real)
    executor.gate.set()
    await ended(client, video["id"])
    assert "openai-poll-after-ms" not in (await client.get(f"{URL}/{video['id']}")).headers


async def test_quotes_take_what_is_asked_of_a_video(client, executor):
    quote = (await client.post("/v1/quotes", json=BODY | {"num_frames": 10, "slo_ms": 60_000})).json()
    assert (quote["feasible"], quote["slo_ms"], len(quote["data"])) == (True, 60_000, 1)
    assert quote["warnings"] == ["num_frames: 10 was rounded to 9: tiny/wan makes 1 + a multiple of 4"]
    named = (await client.post("/v1/quotes", json={"prompt": "a ship", "model": "tiny/wan"})).json()
    image = (await client.post("/v1/quotes", json={"prompt": "a ship", "size": "64x64"})).json()
    assert named["predicted_finish_ms"] > image["predicted_finish_ms"]
    for body, param in (({"model": "tiny/wan", "n": 2}, "n"), ({"seconds": 1, "quality": "hd"}, "quality")):
        error_of(await client.post("/v1/quotes", json={"prompt": "a ship", **body}), param)
    assert executor.started == []


async def test_the_log_has_no_prompt_and_names_the_video(create, client, caplog):
    caplog.set_level("INFO")
    video = await create(prompt="a very secret lighthouse", negative_prompt="a secret")
    await ended(client, video["id"])
    await client.post(f"{URL}/sync", json=BODY | {"prompt": "a secret ship"})
    assert "secret" not in caplog.text
    assert f"video={video['id']} frames=9" in caplog.text


async def test_metrics_have_the_routes_and_not_the_ids(create, client):
    video = await ended(client, (await create())["id"])
    await client.get(f"{URL}/{video['id']}/content")
    text = (await client.get("/metrics")).text
    assert 'route="/v1/videos/{video_id}/content",status="200"' in text
    assert video["id"] not in text


async def test_images_and_videos_share_the_pool(client, create, executor):
    video = await create()
    image = await client.post("/v1/images/generations", json={"prompt": "a ship", "size": "64x64"})
    assert image.status_code == 200
    assert (await ended(client, video["id"]))["status"] == "completed"
    assert {command.work[0].request.model for command in executor.started} == {"images", "videos"}


async def test_before_the_engine_is_there_all_is_a_503(connect):
    async with connect(EngineSlot()) as client:
        for response in (
            await client.post(URL, json=BODY), await client.post(f"{URL}/sync", json=BODY), await client.get(URL),
            await client.get(f"{URL}/video_x"), await client.delete(f"{URL}/video_x"),
            await client.get(f"{URL}/video_x/content"), await client.post(f"{URL}/video_x/remix", json={"prompt": "x"}),
        ):  # fmt: skip
            assert response.status_code == 503


async def test_an_executor_that_fails_the_scheduler_fails_its_videos(create, client, engine, executor):
    executor.gate.clear()
    video = await create()
    with pytest.raises(KeyboardInterrupt), engine._guarded("a test"):
        raise KeyboardInterrupt
    failed = await ended(client, video["id"])
    assert (failed["status"], failed["error"]["code"]) == ("failed", "internal_error")


async def test_a_worker_leaves_a_file_that_players_read():
    av = pytest.importorskip("av")
    executor = FakeExecutor()
    engine = make_engine(executor, cards=BOTH)
    outcomes = outcomes_of(engine)
    from tetriserve.engine import Generation, VideoWish

    made = await engine.generate_video(Generation(prompt="a ship", size="96x64", video=VideoWish(num_frames=13, fps=5)))
    with av.open(io.BytesIO(made.content.video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate) == 5.0
    assert [frame.shape for frame in frames] == [(64, 96, 3)] * 13
    assert outcomes[0].request.shape == Shape(64, 96, 13)
    await engine.stop()
