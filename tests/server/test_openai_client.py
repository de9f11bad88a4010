"""OpenAI's own Python client: `images.generate` with every documented parameter is an image or a documented refusal."""

from __future__ import annotations

import base64
import typing
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from fake_engine import CARD
from openai.types import image_generate_params

from tests.waiting import HANG_S

BASE: dict[str, Any] = {"prompt": "a lighthouse", "model": CARD.name, "size": "64x64"}
SVG = {"output_format": "svg", "svg": {"model": "x", "reasoning": {"effort": "low"}}}
ALLOWED: dict[str, tuple[dict[str, Any], ...]] = {
    "prompt": ({},),
    "background": ({"background": "auto"}, {"background": "opaque"}),
    "complexity": tuple({"complexity": value} for value in ("low", "medium", "high")),
    "model": ({"model": CARD.name}, {"model": "default"}),
    "moderation": ({"moderation": "auto"}, {"moderation": "low"}),
    "n": ({"n": 1}, {"n": 10}),
    "output_compression": (
        {"output_compression": 50}, {"output_compression": 0, "output_format": "jpeg"},
        {"output_compression": 100, "output_format": "webp"},
    ),
    "output_format": tuple({"output_format": value} for value in ("png", "jpeg", "webp")),
    "partial_images": ({"partial_images": 0},),
    "quality": tuple(
        {"quality": value} for value in ("low", "medium", "high", "xhigh", "max", "auto", "standard", "hd")
    ),
    "response_format": ({"response_format": "b64_json"}, {"response_format": "url"}),
    "safety_identifier": ({"safety_identifier": "ada"},),
    "size": ({"size": "auto"}, {"size": "256x256"}, {"size": "128x64"}),
    "style": ({"style": "vivid"}, {"style": "natural"}),
    "user": ({"user": "ada"},),
    "stream": ({"stream": False},),
}  # fmt: skip
"""By parameter: values that lead to an image."""
REFUSED: dict[str, tuple[dict[str, Any], ...]] = {
    "background": ({"background": "transparent"},),
    "frame_count": ({"frame_count": 4}, {"frame_count": 4, "output_format": "gif"}),
    "frame_duration_ms": ({"frame_duration_ms": 100},),
    "n": ({"n": 0}, {"n": 11}),
    "output_format": ({"output_format": "gif"},),
    "partial_images": ({"partial_images": 2},),
    "size": ({"size": "63x64"}, {"size": "3840x2160"}),
    "svg": (SVG, {"svg": SVG["svg"]}),
}
"""By parameter: values that are refused, as `docs/http.md` says."""


@pytest.fixture
async def ai(start_live) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{await start_live().url}/v1", api_key="none", max_retries=0) as client:
        yield client


def cases(table: dict[str, tuple[dict[str, Any], ...]]) -> list[Any]:
    return [pytest.param(name, fields, id=str(fields)) for name, several in table.items() for fields in several]


def test_every_documented_parameter_has_a_case():
    documented = typing.get_type_hints(image_generate_params.ImageGenerateParamsNonStreaming)
    assert set(documented) == ALLOWED.keys() | REFUSED.keys()


@pytest.mark.parametrize(("name", "fields"), cases(ALLOWED))
async def test_a_parameter_leads_to_an_image(ai, name, fields):
    answer = await ai.images.generate(**BASE | fields)
    assert len(answer.data) == fields.get("n", 1)
    for item in answer.data:
        if item.url is not None:
            async with httpx.AsyncClient(timeout=HANG_S) as http:
                file = (await http.get(item.url)).content
        else:
            file = base64.b64decode(item.b64_json)
        assert file[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0", b"RIFF")
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens > 0
    assert answer.background == "opaque"
    assert answer.output_format == fields.get("output_format", "png")


@pytest.mark.parametrize(("name", "fields"), cases(REFUSED))
async def test_a_parameter_is_refused_by_its_name(ai, name, fields):
    with pytest.raises(openai.BadRequestError) as refused:
        await ai.images.generate(**BASE | fields)
    error = refused.value.body
    assert error["param"] in fields
    assert error["message"]
    assert "\n" not in error["message"]


async def test_warnings_reach_the_client(ai):
    answer = await ai.images.generate(**BASE, quality="hd", style="vivid")
    assert [warning.split()[0] for warning in answer.warnings] == ["quality", "style"]


async def test_another_model_is_not_found(ai):
    with pytest.raises(openai.NotFoundError, match="'gpt-image-2' is not served; served: 'tiny/flux'"):
        await ai.images.generate(**BASE | {"model": "gpt-image-2"})
    with pytest.raises(openai.NotFoundError):
        await ai.models.retrieve("gpt-image-2")


async def test_a_stream_with_every_parameter_that_is_served(ai):
    stream = await ai.images.generate(
        **BASE, stream=True, partial_images=3, n=2, quality="high", moderation="low", background="opaque",
        output_format="jpeg", output_compression=60, user="ada", response_format="b64_json",
    )  # fmt: skip
    completed = [event async for event in stream if event.type == "image_generation.completed"]
    assert len(completed) == 2
    assert completed[0].usage.total_tokens == 80
    assert [warning.split()[0] for warning in completed[0].warnings] == ["quality", "moderation"]
