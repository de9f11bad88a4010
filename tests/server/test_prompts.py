"""Prompts, sizes and bodies at their limits: every text is drawn or refused, and what is drawn is what was sent."""

from __future__ import annotations

import json
import logging

import pytest
from fake_engine import CARD, FAILING, SIDES

from tests.hostile import PROMPTS
from tetriserve.core.events import Submitted
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.engine import Generation
from tetriserve.server import EngineSlot
from tetriserve.server.schemas import ImagesRequest
from tetriserve.server.uploads import MAX_BODY_BYTES
from tetriserve.workload.outcome import Outcome

URL = "/v1/images/generations"
JSON = {"Content-Type": "application/json"}

SPACES = [" ", "\t\r\n", "\u00a0", "\u2003\u3000", "\u2028\u2029", "\x1c\x1d\x1e\x1f\x85", "\x0b\x0c"]


@pytest.fixture
def seen(engine):
    """The prompts of images that were made."""
    prompts = []

    def note(observation):
        if isinstance(observation, Outcome):
            prompts.append(observation.request.prompt)

    engine.subscribe(note)
    return prompts


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
async def test_any_text_is_drawn_as_it_was_sent(draw, seen, prompt):
    response = await draw(prompt=prompt, negative_prompt=prompt, user=prompt)
    assert response.status_code == 200, response.text
    assert response.json()["user"] == prompt
    assert seen == [prompt]


@pytest.mark.parametrize("prompt", [*SPACES, ""])
async def test_spaces_of_any_kind_are_drawn_as_the_pipeline_draws_them(draw, seen, prompt):
    response = await draw(prompt=prompt)
    assert response.status_code == 200, response.text
    assert seen == [prompt]


@pytest.mark.parametrize(("num_words", "is_truncated"), [(0, False), (5, False), (63, False), (64, True)])
async def test_the_answer_tells_how_long_the_prompt_is_and_whether_its_end_was_cut(draw, num_words, is_truncated):
    response = await draw(prompt=" ".join(["word"] * num_words))
    (image,) = response.json()["data"]
    assert (image["schedule"]["prompt_tokens"], image["schedule"]["truncated"]) == (num_words + 1, is_truncated)


async def test_a_megabyte_of_text_is_refused_without_being_repeated(draw):
    response = await draw(prompt="x" * (MAX_BODY_BYTES - 1000))
    assert response.status_code == 400
    assert "8000" in response.json()["error"]["message"]
    assert len(response.content) < 1000
    assert (await draw(prompt="x" * MAX_BODY_BYTES)).status_code == 413


@pytest.mark.parametrize(
    ("size", "status"),
    [
        (f"{SIDES[0]}x{SIDES[0]}", 200),
        (f"{SIDES[-1]}x{SIDES[-1]}", 200),
        ("64x48", 400),  # below the smallest
        ("80x64", 200),
        ("256x272", 400),  # above the largest
        ("63x64", 400),
        ("65x64", 400),
        ("512x128", 200),  # as long as a side may be
        ("128x512", 200),
        ("528x112", 400),
        ("4096x16", 400),
        ("16x4096", 400),
        ("999999x999999", 400),
        ("9" * 5000 + "x64", 400),
        ("\u0666\u0664x64", 400),
        ("64X64", 400),
        (" 64x64", 400),
        ("64x64\n", 400),
        ("+64x64", 400),
        ("64x64x2", 400),
        ("", 400),
    ],
)
async def test_sizes_at_every_limit(draw, size, status):
    response = await draw(size=size)
    assert response.status_code == status, response.text
    if status == 200:
        assert Shape.parse(response.json()["size"]).num_pixels % CARD.size_multiple**2 == 0
    else:
        assert response.json()["error"]["param"] == "size"
        assert len(response.content) < 1000


@pytest.mark.parametrize(
    "body",
    [
        '{"prompt": "a", "x": ' + "[" * 500 + "]" * 500 + "}",
        '{"prompt": "a", "x": ' + '{"a":' * 50_000 + "1" + "}" * 50_000 + "}",
        '{"prompt": ' + "1" * 100_000 + "}",
        '{"prompt": "a", "seed": -1e-999999999}',
        '{"prompt": "a", "slo_ms": 1' + "0" * 4000 + "}",
        '{"prompt": "a", ' + ", ".join(f'"f{n}": 1' for n in range(20_000)) + "}",
    ],
    ids=["deep", "deeper", "long number", "tiny number", "huge number", "many fields"],
)
async def test_extreme_json_is_a_400(client, body):
    response = await client.post(URL, content=body, headers=JSON)
    assert response.status_code == 400, response.text[:500]
    assert len(response.content) < 2000


async def test_of_fields_given_twice_the_last_one_counts(client, seen):
    body = '{"prompt": "first", "size": "64x64", "prompt": "last"}'
    assert (await client.post(URL, content=body, headers=JSON)).status_code == 200
    assert seen == ["last"]


@pytest.mark.parametrize("name", ["X-SLO-Ms", "X-Request-Id", "Authorization", "traceparent", "X-Unknown"])
@pytest.mark.parametrize(
    "value", [b"", b"\xff\xfe", b"\x01", b"a" * 60_000, b"9" * 5000, b"1e400", b"-0", b"0x10", b"1_0"]
)
async def test_no_header_is_the_servers_fault(client, name, value):
    body = json.dumps({"prompt": "a lighthouse", "size": "64x64", "num_inference_steps": 1}).encode()
    headers = [(b"Content-Type", b"application/json"), (name.encode(), value)]
    response = await client.post(URL, content=body, headers=headers)
    assert response.status_code in (200, 400), response.text
    assert len(response.headers["X-Request-Id"]) <= 128


QUOTED = [
    {"prompt": ["hush"]},
    {"prompt": {"hush": "hush"}},
    {"prompt": "hush \ud800"},
    {"prompt": "hush", "negative_prompt": ["hush"]},
    *({"prompt": "hush", field: "hush"} for field in sorted(ImagesRequest.model_fields.keys() - {"prompt"})),
    {"prompt": "hush", "a hush field": 1},
    {"hush": "hush"},
    ["hush"],
    "hush",
]


@pytest.mark.parametrize("path", [URL, "/v1/quotes"])
@pytest.mark.parametrize("body", QUOTED, ids=str)
async def test_no_field_of_a_body_is_logged(client, caplog, path, body):
    with caplog.at_level(logging.DEBUG):
        response = await client.post(path, content=json.dumps(body), headers=JSON)
    if isinstance(body, dict) and body.get("request_id"):
        return  # a name for logs
    assert "hush" not in caplog.text
    assert path in caplog.text
    assert f" {response.status_code} in " in caplog.text
    assert "hush" not in str([vars(record) for record in caplog.records])


@pytest.mark.parametrize("header", ["X-SLO-Ms", "Idempotency-Key", "Content-Type"])
async def test_no_header_that_is_refused_is_logged(client, caplog, header):
    with caplog.at_level(logging.DEBUG):
        response = await client.post(URL, content=b'{"prompt": "hush"}', headers=JSON | {header: "hush"})
    assert response.status_code == 400
    assert "hush" not in caplog.text


def test_no_repr_shows_a_prompt():
    generation = Generation(prompt="hush", negative_prompt="hush")
    request = Request(
        request_id="a",
        prompt="hush",
        negative_prompt="hush",
        shape=Shape(64, 64),
        stages=image_stages(1),
        seed=0,
        arrival_s=0.0,
        deadline_s=1.0,
    )
    for value in (generation, request, Submitted(request), ImagesRequest(prompt="hush", negative_prompt="hush")):
        assert "hush" not in repr(value)


async def test_neither_prompts_nor_keys_are_logged(connect, engine, caplog):
    headers = {"Authorization": "Bearer hush-key"}
    with caplog.at_level(logging.DEBUG):
        async with connect(EngineSlot(engine), api_keys=("hush-key",)) as client:
            for body in (
                {"prompt": "hush", "size": "64x64"},
                {"prompt": "hush", "size": "3x3"},
                {"prompt": FAILING + " hush"},
            ):
                await client.post(URL, json=body, headers=headers)
            await client.post(URL, json={"prompt": "hush"}, headers={"Authorization": "Bearer hush-other"})
    assert len(caplog.records) >= 4
    assert "hush" not in caplog.text
