"""Parameters of OpenAI's clients that are not served: ignored with a warning, or refused under `--compat strict`."""

from __future__ import annotations

import base64
import json

import pytest
from fake_engine import outcomes_of

from tetriserve.config import ApiConfig
from tetriserve.server import EngineSlot
from tetriserve.server.compat import PICTURE
from tetriserve.server.schemas import PictureOptions

IGNORED = [
    ("quality", "low"), ("quality", "medium"), ("quality", "high"), ("quality", "xhigh"), ("quality", "max"),
    ("quality", "hd"), ("style", "vivid"), ("style", "natural"), ("moderation", "low"), ("complexity", "low"),
    ("complexity", "high"), ("output_compression", 80), ("fps", 24), ("guidance_scale_2", 4.0),
    ("extra_args", {"num_steps": 4}),
]  # fmt: skip
SERVED = [
    ("quality", "auto"), ("quality", "standard"), ("style", "auto"), ("moderation", "auto"), ("background", "auto"),
    ("background", "opaque"), ("output_compression", 100), ("num_frames", 1), ("user", "ada"),
    ("safety_identifier", "ada"), ("extra_args", ""), ("extra_args", {}),
]  # fmt: skip


@pytest.fixture
async def strict(connect, engine):
    async with connect(EngineSlot(engine), api=ApiConfig(compat="strict")) as client:
        yield client


BODY = {"prompt": "a lighthouse", "size": "64x64", "seed": 1}


@pytest.mark.parametrize(("name", "value"), IGNORED)
async def test_what_changes_no_picture_is_ignored_with_a_warning(draw, name, value):
    plain, answer = (await draw(seed=1)).json(), await draw(seed=1, **{name: value})
    assert answer.status_code == 200, answer.text
    (warning,) = answer.json()["warnings"]
    assert warning.startswith(f"{name} ")
    assert " is ignored: " in warning
    if isinstance(value, str):
        assert f"{name} {value!r} is ignored" in warning
    assert answer.json()["data"][0]["b64_json"] == plain["data"][0]["b64_json"]


@pytest.mark.parametrize(("name", "value"), IGNORED)
async def test_strict_refuses_it_by_name(strict, name, value):
    response = await strict.post("/v1/images/generations", json={**BODY, name: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (name, "invalid_value")
    assert "is not served" in error["message"]
    if served := PICTURE[name].served if name in PICTURE and isinstance(value, str) else ():
        assert all(repr(each) in error["message"] for each in served)


@pytest.mark.parametrize(("name", "value"), SERVED)
async def test_what_asks_for_nothing_else_is_served_without_a_warning(strict, draw, name, value):
    for response in (
        await draw(**{name: value}),
        await strict.post("/v1/images/generations", json={**BODY, name: value}),
    ):
        assert response.status_code == 200, response.text
        assert "warnings" not in response.json()


@pytest.mark.parametrize(
    "fields", [{"background": "transparent"}, {"output_format": "gif"}, {"svg": {}}, {"frame_count": 2}, {"steps": 5}]
)
async def test_what_would_change_the_picture_and_what_is_unknown_is_refused_either_way(strict, draw, fields):
    for response in (await draw(**fields), await strict.post("/v1/images/generations", json={**BODY, **fields})):
        assert response.status_code == 400
        assert response.json()["error"]["param"] == next(iter(fields))


async def test_several_warnings_come_in_one_list_and_their_names_are_in_the_log(draw, caplog):
    caplog.set_level("INFO")
    answer = (await draw(quality="hd", style="vivid", output_compression=5)).json()
    assert [warning.split()[0] for warning in answer["warnings"]] == ["quality", "style", "output_compression"]
    assert "ignored=quality,style,output_compression" in caplog.text


async def test_streams_and_quotes_warn_too(client):
    body = {**BODY, "quality": "high"}
    stream = await client.post("/v1/images/generations", json={**body, "stream": True})
    completed = json.loads(stream.text.rsplit("data: ", 1)[1])
    assert completed["warnings"] == ["quality 'high' is ignored: one quality is served"]
    quote = (await client.post("/v1/quotes", json=body)).json()
    assert quote["warnings"] == completed["warnings"]
    assert "warnings" not in (await client.post("/v1/quotes", json=BODY)).json()


async def test_identifiers_are_echoed(draw):
    answer = (await draw(user="ada", safety_identifier="lovelace")).json()
    assert (answer["user"], answer["safety_identifier"]) == ("ada", "lovelace")


async def test_the_quality_of_a_lossy_file_is_served(draw):
    sizes = []
    for quality in (1, 90):
        answer = (await draw(seed=1, size="256x256", output_format="webp", output_compression=quality)).json()
        assert "warnings" not in answer
        sizes.append(len(base64.b64decode(answer["data"][0]["b64_json"])))
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("as_text", [False, True])
async def test_a_deadline_in_extra_args_is_the_requests(draw, engine, as_text):
    """GF-DiT's load generator counts both times from the start of its workload."""
    said = {"runtime_v2_arrival_ms": 60_000.0, "runtime_v2_deadline_ms": 64_500.0, "runtime_v2_request_class": "S"}
    outcomes = outcomes_of(engine)
    extra_args = json.dumps(said) if as_text else said
    response = await draw(extra_args=extra_args)
    assert response.status_code == 200, response.text
    await draw(extra_args=extra_args, slo_ms=1000)
    await draw(extra_args=extra_args, headers={"X-SLO-Ms": "2000"})
    slos = [outcome.request.deadline_s - outcome.request.arrival_s for outcome in outcomes]
    assert slos == pytest.approx([4.5, 1.0, 2.0])


async def test_a_deadline_in_extra_args_that_is_past_is_refused(draw):
    response = await draw(extra_args={"runtime_v2_arrival_ms": 5, "runtime_v2_deadline_ms": 5})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "slo_ms")


def test_every_parameter_that_may_be_ignored_is_a_field():
    assert set(PICTURE) <= set(PictureOptions.model_fields)
