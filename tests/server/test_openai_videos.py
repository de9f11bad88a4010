"""OpenAI's own Python client, unmodified: its videos are made, polled, downloaded, listed, remixed and deleted."""

from __future__ import annotations

import io
import typing
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest
from fake_engine import BOTH, FAILING, FakeExecutor, outcomes_of, video_file
from live_server import Live
from openai.types import video_create_params
from pictures_sent import PNG
from PIL import Image

from tests.waiting import until
from tetriserve.core.request import Shape
from tetriserve.workload.outcome import Status

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")

EXTRA = {"num_inference_steps": 3, "seed": 7, "slo_ms": 60_000.0}


@pytest.fixture
async def live(start_live: Callable[..., Live]) -> Live:
    return start_live(cards=BOTH)


@pytest.fixture
async def ai(live: Live) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{await live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_create_and_poll_then_download(ai: openai.AsyncOpenAI, live: Live) -> None:
    await ai.models.list()
    assert live.engine is not None
    outcomes = outcomes_of(live.engine)
    video = await ai.videos.create_and_poll(
        model="tiny/wan", prompt="a lighthouse", seconds="1", size="64x64", extra_body=EXTRA
    )
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert (video.model, video.size, video.prompt) == ("tiny/wan", "64x64", "a lighthouse")
    assert video.completed_at is not None
    assert video.expires_at is not None
    request = outcomes[0].request
    assert (request.shape, request.num_steps, request.seed) == (Shape(64, 64, 9), 3, 7)
    expected = video_file(request)
    content = await ai.videos.download_content(video.id)
    assert content.content == expected.video
    thumbnail = await ai.videos.download_content(video.id, variant="thumbnail")
    assert Image.open(io.BytesIO(thumbnail.content)).size == (64, 64)
    extra = video.model_extra
    assert extra is not None
    assert (extra["num_frames"], extra["slo_ms"]) == (9, 60_000)
    assert len(extra["schedule"]["degrees"]) == 3
    with pytest.raises(openai.BadRequestError) as refused:
        await ai.videos.download_content(video.id, variant="spritesheet")
    assert "served: 'video' or 'thumbnail'" in refused.value.message


async def test_a_list_is_walked_page_by_page(ai: openai.AsyncOpenAI) -> None:
    made = [(await ai.videos.create(prompt=f"ship {number}", extra_body=EXTRA)).id for number in range(5)]
    assert [video.id async for video in ai.videos.list(limit=2)] == made[::-1]
    assert [video.id async for video in ai.videos.list(limit=2, order="asc", after=made[1])] == made[2:]


async def test_delete(ai: openai.AsyncOpenAI, live: Live, executor: FakeExecutor) -> None:
    executor.gate.clear()
    video = await ai.videos.create(prompt="a ship")
    assert live.engine is not None
    outcomes = outcomes_of(live.engine)
    deleted = await ai.videos.delete(video.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
    executor.gate.set()
    await until(lambda: outcomes)
    assert outcomes[0].status is Status.CANCELLED
    for call in (ai.videos.retrieve, ai.videos.delete, ai.videos.download_content):
        with pytest.raises(openai.NotFoundError):
            await call(video.id)


async def test_remix(ai: openai.AsyncOpenAI) -> None:
    video = await ai.videos.create_and_poll(prompt="a ship", extra_body=EXTRA)
    remix = await ai.videos.poll((await ai.videos.remix(video.id, prompt="a boat")).id)
    assert (remix.status, remix.prompt, remix.remixed_from_video_id) == ("completed", "a boat", video.id)
    assert remix.size == video.size


async def test_input_reference(ai: openai.AsyncOpenAI, live: Live) -> None:
    await ai.models.list()
    assert live.engine is not None
    outcomes = outcomes_of(live.engine)
    video = await ai.videos.create_and_poll(prompt="a ship", input_reference=("in.png", PNG), size="96x64")
    assert video.status == "completed"
    assert (outcomes[0].request.images, outcomes[0].request.shape) == ((Shape(48, 80),), Shape(64, 96, 9))


async def test_a_video_that_fails(ai: openai.AsyncOpenAI) -> None:
    video = await ai.videos.create_and_poll(prompt=FAILING)
    assert video.status == "failed"
    assert video.error is not None
    assert (video.error.code, "not finite" in video.error.message) == ("generation_failed", True)
    with pytest.raises(openai.ConflictError) as refused:
        await ai.videos.download_content(video.id)
    assert refused.value.code == "video_failed"


async def test_content_before_it_is_ready(ai: openai.AsyncOpenAI, executor: FakeExecutor) -> None:
    executor.gate.clear()
    video = await ai.videos.create(prompt="a ship")
    with pytest.raises(openai.ConflictError) as refused:
        await ai.videos.download_content(video.id)
    assert refused.value.code == "video_not_ready"


BAD: dict[str, tuple[dict[str, Any], ...]] = {
    "prompt": ({"prompt": "x" * 8001},),
    "input_reference": ({"input_reference": ("in.png", b"no picture")},),
    "model": ({"model": "sora-2"},),
    "seconds": ({"seconds": "12"}, {"seconds": "four"}),
    "size": ({"size": "1280x720"}, {"size": "large"}),
}
"""By documented parameter: values that are refused."""


def test_every_documented_parameter_has_a_case() -> None:
    assert set(typing.get_type_hints(video_create_params.VideoCreateParams)) == BAD.keys()


@pytest.mark.parametrize(("param", "fields"), [(param, each) for param, several in BAD.items() for each in several])
async def test_a_parameter_is_refused_by_its_name(ai: openai.AsyncOpenAI, param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.NotFoundError if param == "model" else openai.BadRequestError) as refused:
        await ai.videos.create(**{"prompt": "a ship"} | fields)
    assert refused.value.param == param
    assert "\n" not in refused.value.message
