"""OpenAI's own Python client: `images.edit` with every documented parameter is an image or a documented refusal."""

from __future__ import annotations

import base64
import typing
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from fake_engine import CARD
from openai.types import image_edit_params
from pictures_sent import PNG

BASE: dict[str, Any] = {"image": ("in.png", PNG), "prompt": "a lighthouse", "model": CARD.name, "size": "64x64"}
FILE = ("mask.png", PNG, "image/png")
ALLOWED: dict[str, tuple[dict[str, Any], ...]] = {
    "image": ({}, {"image": [PNG]}, {"image": [("a.png", PNG)]}, {"image": ("a.bin", PNG, "text/plain")}),
    "prompt": ({},),
    "background": ({"background": "auto"}, {"background": "opaque"}),
    "complexity": tuple({"complexity": value} for value in ("low", "medium", "high")),
    "input_fidelity": ({"input_fidelity": "low"}, {"input_fidelity": "high"}),
    "model": ({"model": CARD.name}, {"model": "default"}),
    "n": ({"n": 1}, {"n": 10}),
    "output_compression": ({"output_compression": 50}, {"output_compression": 0, "output_format": "jpeg"}),
    "output_format": tuple({"output_format": value} for value in ("png", "jpeg", "webp")),
    "partial_images": ({"partial_images": 0},),
    "quality": tuple({"quality": value} for value in ("low", "medium", "high", "xhigh", "max", "auto", "standard")),
    "response_format": ({"response_format": "b64_json"}, {"response_format": "url"}),
    "safety_identifier": ({"safety_identifier": "ada"},),
    "size": ({"size": "auto"}, {"size": "256x256"}, {"size": "128x64"}),
    "user": ({"user": "ada"},),
    "stream": ({"stream": False},),
}
"""By parameter: values that lead to an image."""
REFUSED: dict[str, tuple[dict[str, Any], ...]] = {
    "image": ({"image": ("a.png", b"no picture")}, {"image": [PNG, PNG]}),
    "background": ({"background": "transparent"},),
    "frame_count": ({"frame_count": 4},),
    "frame_duration_ms": ({"frame_duration_ms": 100},),
    "markup": ({"markup": FILE},),
    "mask": ({"mask": FILE},),
    "n": ({"n": 0}, {"n": 11}),
    "output_format": ({"output_format": "gif"}, {"output_format": "svg"}),
    "partial_images": ({"partial_images": 2},),
    "size": ({"size": "63x64"},),
    "svg": ({"svg": {"model": "x", "reasoning": {"effort": "low"}}},),
}
"""By parameter: values that are refused, as `docs/openai.md` says."""


@pytest.fixture
async def ai(start_live) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{await start_live().url}/v1", api_key="none", max_retries=0) as client:
        yield client


def cases(table: dict[str, tuple[dict[str, Any], ...]]) -> list[Any]:
    return [
        pytest.param(fields, id=f"{name}-{number}")
        for name, several in table.items()
        for number, fields in enumerate(several)
    ]


def test_every_documented_parameter_has_a_case():
    documented = typing.get_type_hints(image_edit_params.ImageEditParamsNonStreaming)
    assert set(documented) == ALLOWED.keys() | REFUSED.keys()


@pytest.mark.parametrize("fields", cases(ALLOWED))
async def test_a_parameter_leads_to_an_image(ai, fields):
    answer = await ai.images.edit(**BASE | fields)
    assert len(answer.data) == fields.get("n", 1)
    assert all((item.url or base64.b64decode(item.b64_json)) for item in answer.data)
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens > 0
    assert answer.output_format == fields.get("output_format", "png")


@pytest.mark.parametrize("fields", cases(REFUSED))
async def test_a_parameter_is_refused_by_its_name(ai, fields):
    with pytest.raises(openai.BadRequestError) as refused:
        await ai.images.edit(**BASE | fields)
    error = refused.value.body
    assert error["param"] in fields
    assert error["message"]
    assert "\n" not in error["message"]


async def test_our_own_fields_go_into_extra_body(ai):
    extra = {"num_inference_steps": 10, "strength": 0.35, "seed": 7, "slo_ms": 60_000.0, "degrees": [1, 2]}
    (item,) = (await ai.images.edit(**BASE, extra_body=extra)).data
    assert (item.seed, item.schedule["slo_ms"], len(item.schedule["degrees"])) == (7, 60_000, 4)


async def test_a_stream(ai):
    stream = await ai.images.edit(**BASE, stream=True, partial_images=3, n=2, extra_body={"seed": 5})
    completed = [event async for event in stream if event.type == "image_edit.completed"]
    assert [event.seed for event in completed] == [5, 6]
    assert completed[0].usage.total_tokens == 80
