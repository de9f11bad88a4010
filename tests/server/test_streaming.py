"""Images as server-sent events."""

from __future__ import annotations

import asyncio
import base64
import io
import json

import httpx
import numpy as np
import openai
import pytest
from fake_engine import CARD, FAILING, outcomes_of
from PIL import Image

from tests.states import bundle_of
from tests.waiting import HANG_S, until
from tetriserve.config import ApiConfig
from tetriserve.core.stages import DENOISE
from tetriserve.models.preview import PATCH
from tetriserve.server import EngineSlot

URL = "/v1/images/generations"
BODY = {"prompt": "a lighthouse", "size": "64x64", "stream": True}
NUM_STEPS = 60
"""Of 256x256: more than one task does."""


def events_of(response):
    """(name, data) of every event."""
    assert response.headers["Content-Type"].startswith("text/event-stream")
    events = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def picture_of(event):
    return Image.open(io.BytesIO(base64.b64decode(event["b64_json"])))


async def test_progress_comes_at_both_ends_of_every_task_and_then_the_image(client):
    response = await client.post(URL, json={**BODY, "seed": 7, "slo_ms": 60_000, "request_id": "mine"})
    assert response.status_code == 200
    assert response.headers["X-Request-Id"] == "mine"
    events = events_of(response)
    assert all(name == data["type"] for name, data in events)
    course = [(data["stage"], data["step"], data["degree"]) for _, data in events[:-1]]
    assert course == [
        ("encode", 0, 0), ("encode", 0, 1), ("encode", 0, 0),
        ("denoise", 0, 2), ("denoise", 4, 0),
        ("decode", 4, 1), ("decode", 4, 0),
    ]  # fmt: skip
    assert {data["num_steps"] for _, data in events[:-1]} == {4}
    assert all(data["predicted_finish_ms"] >= 0 for _, data in events[:-1])
    name, image = events[-1]
    assert name == "image_generation.completed"
    assert picture_of(image).size == (64, 64)
    assert (image["seed"], image["size"], image["output_format"]) == (7, "64x64", "png")
    assert (image["quality"], image["background"], image["image_index"]) == ("auto", "opaque", 0)
    assert image["schedule"]["attained"] is True
    assert image["schedule"]["degrees"] == [2] * 4
    assert image["usage"] == {
        "input_tokens": 64,
        "input_tokens_details": {"text_tokens": 64, "image_tokens": 0},
        "output_tokens": 16,
        "total_tokens": 80,
    }


async def test_the_image_is_that_of_the_plain_answer(client):
    plain = (await client.post(URL, json={**BODY, "seed": 7, "stream": False})).json()["data"][0]
    *_, (_, streamed) = events_of(await client.post(URL, json={**BODY, "seed": 7}))
    assert streamed["b64_json"] == plain["b64_json"]


async def test_several_images_interleave_by_index(client):
    events = [data for _, data in events_of(await client.post(URL, json={**BODY, "n": 3, "seed": 5}))]
    completed = [data for data in events if data["type"] == "image_generation.completed"]
    assert [(data["image_index"], data["seed"]) for data in completed] == [(0, 5), (1, 6), (2, 7)]
    assert [data["image_index"] for data in events[:3]] == [0, 0, 1]  # all are admitted at once
    first_done = events.index(completed[0])
    assert {data["image_index"] for data in events[first_done:]} == {0, 1, 2}


def noisy_basis(executor):
    """Previews of many colours, as a real model's: one of a single colour takes no bytes in any format."""
    basis = np.random.default_rng(0).uniform(0, 1, (2, PATCH * PATCH * 3)).astype(np.float32)
    executor.preview_bases[""] = executor.states.put(".noisy-basis", bundle_of(basis=basis))


def previews_of(response):
    events = [data for _, data in events_of(response)]
    return [data for data in events if data["type"] == "image_generation.partial_image"], events[-1]


@pytest.mark.parametrize("num_wanted", [1, 2, 3])
async def test_previews_come_as_tasks_end_and_never_more_than_asked_for(client, num_wanted):
    body = {**BODY, "size": "256x256", "partial_images": num_wanted, "num_inference_steps": NUM_STEPS}
    previews, _ = previews_of(await client.post(URL, json=body))
    assert [data["partial_image_index"] for data in previews] == list(range(len(previews)))
    assert 1 <= len(previews) <= num_wanted
    assert {data["image_index"] for data in previews} == {0}


@pytest.mark.parametrize(
    ("output_format", "preview_format"), [(None, "jpeg"), ("png", "jpeg"), ("jpeg", "jpeg"), ("webp", "webp")]
)
async def test_previews_are_small_files_of_the_images_proportions(
    connect, engine, executor, output_format, preview_format
):
    noisy_basis(executor)
    body = {
        **BODY, "size": "256x128", "partial_images": 3, "num_inference_steps": 2 * NUM_STEPS,
        "output_format": output_format,
    }  # fmt: skip
    async with connect(EngineSlot(engine), api=ApiConfig(preview_side=64)) as client:
        previews, image = previews_of(await client.post(URL, json=body))
    assert previews
    for preview in previews:
        picture = picture_of(preview)
        assert (picture.size, picture.format.lower()) == ((64, 32), preview_format)
        assert (preview["size"], preview["output_format"]) == ("64x32", preview_format)
    assert picture_of(image).size == (256, 128)
    assert image["output_format"] == output_format or "png"
    assert sum(len(preview["b64_json"]) for preview in previews) < len(image["b64_json"])


async def test_no_preview_is_larger_than_the_image(connect, engine):
    body = {**BODY, "size": "256x128", "partial_images": 3, "num_inference_steps": 2 * NUM_STEPS}
    async with connect(EngineSlot(engine), api=ApiConfig(preview_side=1024)) as client:
        previews, _ = previews_of(await client.post(URL, json=body))
    assert {preview["size"] for preview in previews} == {"256x128"}


async def test_no_preview_comes_after_the_last_step(client, executor):
    """One task does all of a few steps: what it leaves is the picture, which follows at once."""
    previews, _ = previews_of(await client.post(URL, json={**BODY, "partial_images": 3, "num_inference_steps": 2}))
    assert previews == []
    assert not [key for key in executor.states.gotten if f".{DENOISE}." in key]


async def test_without_previews_asked_for_none_come(client, executor):
    names = [name for name, _ in events_of(await client.post(URL, json=BODY))]
    assert "image_generation.partial_image" not in names
    assert not [key for key in executor.states.gotten if f".{DENOISE}." in key]


async def test_a_preview_that_is_gone_is_left_out(client, executor):
    executor.has_previews = False
    names = [name for name, _ in events_of(await client.post(URL, json={**BODY, "partial_images": 3}))]
    assert names[-1] == "image_generation.completed"
    assert "image_generation.partial_image" not in names


async def test_an_error_before_the_first_event_is_an_ordinary_answer(client, engine):
    bad = await client.post(URL, json={**BODY, "size": "3x3"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "size")
    late = await client.post(URL, json={**BODY, "slo_ms": 2, "deadline_policy": "reject"})
    assert (late.status_code, late.json()["error"]["code"]) == (429, "deadline_infeasible")
    assert engine.state.trajectories == ()


async def test_an_error_on_the_way_is_the_last_event_and_the_log_and_metrics_know(client, caplog):
    caplog.set_level("INFO")
    response = await client.post(URL, json={**BODY, "prompt": FAILING})
    assert response.status_code == 200
    name, data = events_of(response)[-1]
    assert name == "error"
    assert (data["error"]["type"], data["error"]["code"]) == ("server_error", "generation_failed")
    assert "latents are not finite" in data["error"]["message"]
    assert any("POST /v1/images/generations 500" in record.getMessage() for record in caplog.records)
    metrics = (await client.get("/metrics")).text
    assert 'route="/v1/images/generations",status="500"} 1.0' in metrics


async def test_a_stream_counts_as_pending_until_it_ends(connect, engine, executor):
    async with connect(EngineSlot(engine), max_concurrency=1) as client:
        executor.gate.clear()
        streaming = asyncio.create_task(client.post(URL, json=BODY))
        await until(lambda: engine.state.trajectories)
        refused = await client.post(URL, json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_limit_exceeded")
        executor.gate.set()
        assert events_of(await streaming)[-1][0] == "image_generation.completed"
        assert (await client.post(URL, json=BODY)).status_code == 200


async def test_a_client_that_goes_away_in_mid_stream_cancels_its_images(live, executor):
    executor.gate.clear()
    ends = outcomes_of(live.engine)
    async with httpx.AsyncClient(base_url=await live.url, timeout=HANG_S) as http:
        async with http.stream("POST", URL, json={**BODY, "n": 2}) as response:
            assert response.status_code == 200
            await anext(response.aiter_lines())
        await until(lambda: not live.engine.state.trajectories)
        executor.gate.set()
        await until(lambda: len(ends) == 2)
        assert [end.status.value for end in ends] == ["cancelled"] * 2
        assert 'status="499"} 1.0' in (await http.get("/metrics")).text


async def test_the_openai_package_streams(live):
    async with openai.AsyncOpenAI(base_url=f"{await live.url}/v1", api_key="none", max_retries=0) as ai:
        stream = await ai.images.generate(
            prompt="a lighthouse", model=CARD.name, size="256x256", stream=True, partial_images=2,
            extra_body={"num_inference_steps": NUM_STEPS, "slo_ms": 60_000},
        )  # fmt: skip
        events = [event async for event in stream]
    kinds = [event.type for event in events]
    assert kinds[-1] == "image_generation.completed"
    assert "image_generation.progress" in kinds
    previews = [event for event in events if event.type == "image_generation.partial_image"]
    assert [event.partial_image_index for event in previews] == [*range(len(previews))] != []
    assert base64.b64decode(previews[0].b64_json)[:2] == b"\xff\xd8"
    completed = events[-1]
    assert base64.b64decode(completed.b64_json)[:4] == b"\x89PNG"
    assert completed.usage.total_tokens == 64 + 256
    assert completed.schedule["attained"] is True


async def test_the_openai_package_raises_what_a_stream_fails_with(live):
    async with openai.AsyncOpenAI(base_url=f"{await live.url}/v1", api_key="none", max_retries=0) as ai:
        stream = await ai.images.generate(prompt=FAILING, size="64x64", stream=True)
        with pytest.raises(openai.APIError, match="latents are not finite") as failed:
            async for _ in stream:
                pass
        assert failed.value.code == "generation_failed"
