"""What a client gets for a good request."""

from __future__ import annotations

import asyncio
import base64
import io
import time

import numpy as np
import pytest
from fake_engine import CARD, outcomes_of, picture
from PIL import Image

from tetriserve.core.request import Shape
from tetriserve.server.schemas import ImagesRequest


def decoded(item) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))


async def test_the_answer_holds_the_picture_and_what_was_asked(draw):
    before = int(time.time())
    response = await draw(seed=7, size="128x64", user="ada", model=CARD.name, response_format="b64_json")

    assert response.status_code == 200
    answer = response.json()
    assert set(answer) == {
        "id", "created", "model", "size", "output_format", "background", "data", "usage", "user"
    }  # fmt: skip
    assert before <= answer["created"] <= time.time()
    assert (answer["model"], answer["size"], answer["output_format"]) == (CARD.name, "128x64", "png")
    assert answer["user"] == "ada"
    (item,) = answer["data"]
    assert item["seed"] == 7
    image = decoded(item)
    assert image.format == "PNG"
    np.testing.assert_array_equal(np.asarray(image), picture("a lighthouse", 7, Shape(height=64, width=128)))


async def test_usage_is_that_of_all_images_together(draw):
    usage = (await draw(n=3, max_sequence_length=8)).json()["usage"]
    assert usage == {
        "input_tokens": 24,
        "input_tokens_details": {"text_tokens": 24, "image_tokens": 0},
        "output_tokens": 48,
        "total_tokens": 72,
    }


@pytest.mark.parametrize("size", [None, "auto", "128x64"])
async def test_width_and_height_are_a_size(draw, size):
    answer = (await draw(size=size, width=128, height=64)).json()
    assert answer["size"] == "128x64"


async def test_another_size_beside_width_and_height_is_refused(draw):
    response = await draw(size="64x128", width=128, height=64)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["message"]) == (
        "size", "size is '64x128', and width and height are 128x64; leave one out"
    )  # fmt: skip


async def test_a_size_as_width_and_height_is_in_the_log(draw, caplog):
    caplog.set_level("INFO")
    await draw(size=None, width=128, height=64)
    assert "size=128x64" in caplog.text


async def test_seed_minus_one_is_any_seed(draw):
    first, second = [(await draw(seed=-1)).json()["data"][0]["seed"] for _ in range(2)]
    assert first >= 0
    assert first != second


async def test_the_schedule_says_what_happened_in_seconds_after_arrival(draw):
    (item,) = (await draw(size="128x128", num_inference_steps=5, slo_ms=60_000)).json()["data"]
    schedule = item["schedule"]

    assert schedule["attained"] is True
    assert schedule["slo_ms"] == 60_000
    assert schedule["degrees"] == [2] * 5
    assert [run["stage"] for run in schedule["runs"]] == ["encode", "denoise", "decode"]
    assert [run["num_steps"] for run in schedule["runs"]] == [0, 5, 0]
    assert [run["ranks"] for run in schedule["runs"]] == [[0], [0, 1], [0]]
    assert [run["degree"] for run in schedule["runs"]] == [1, 2, 1]
    times = [time_s for run in schedule["runs"] for time_s in (run["start_s"], run["end_s"])]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= schedule["finish_s"] == schedule["latency_s"] < 60
    worked_s = sum(run["end_s"] - run["start_s"] for run in schedule["runs"])
    assert schedule["queued_s"] == pytest.approx(schedule["latency_s"] - worked_s, abs=1e-5)
    assert schedule["gpu_time_s"] == pytest.approx(
        sum((run["end_s"] - run["start_s"]) * run["degree"] for run in schedule["runs"]), abs=1e-5
    )
    assert 0 < schedule["predicted_finish_s"] < 60


async def test_a_missed_deadline_is_said_and_the_picture_comes_all_the_same(draw):
    (item,) = (await draw(slo_ms=1)).json()["data"]
    assert item["schedule"]["attained"] is False
    assert decoded(item).size == (64, 64)


async def test_n_images_take_consecutive_seeds(draw):
    answer = (await draw(n=3, seed=40)).json()
    assert [item["seed"] for item in answer["data"]] == [40, 41, 42]
    for item in answer["data"]:
        expected = picture("a lighthouse", item["seed"], Shape(64, 64))
        np.testing.assert_array_equal(np.asarray(decoded(item)), expected)


async def test_without_a_seed_each_image_has_its_own_and_it_is_told(draw):
    answer = (await draw(n=4)).json()
    seeds = [item["seed"] for item in answer["data"]]
    assert len(set(seeds)) == 4
    np.testing.assert_array_equal(
        np.asarray(decoded(answer["data"][2])), picture("a lighthouse", seeds[2], Shape(64, 64))
    )


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_output_formats(draw, output_format):
    answer = (await draw(output_format=output_format)).json()
    assert answer["output_format"] == output_format
    assert decoded(answer["data"][0]).format == output_format.upper()


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
async def test_output_compression_is_the_quality(draw, output_format):
    sizes = []
    for quality in (0, 50, None):
        answer = await draw(seed=1, size="256x256", output_format=output_format, output_compression=quality)
        sizes.append(len(answer.json()["data"][0]["b64_json"]))
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.8 * sizes[2]


@pytest.mark.parametrize("size", [None, "auto"])
async def test_the_default_size_is_the_models_first(draw, size):
    answer = (await draw(size=size)).json()
    assert answer["size"] == str(CARD.sizes[0]) == "128x128"


async def test_fields_reach_the_engine(draw, engine):
    outcomes = outcomes_of(engine)
    response = await draw(
        num_inference_steps=3,
        guidance_scale=2.5,
        negative_prompt="fog",
        true_cfg_scale=6,
        priority=-2,
        slo_ms=1234.5,
        seed=9,
    )
    assert response.status_code == 200
    request = outcomes[0].request
    assert (request.num_steps, request.guidance_scale, request.seed, request.priority) == (3, 2.5, 9, -2)
    assert (request.negative_prompt, request.true_cfg_scale, request.stepped.num_passes) == ("fog", 6, 2)
    assert request.deadline_s - request.arrival_s == pytest.approx(1.2345)


async def test_null_fields_are_absent_fields(draw):
    names = set(ImagesRequest.model_fields) - {"prompt", "size"}
    response = await draw(**dict.fromkeys(names))
    assert response.status_code == 200
    assert len(response.json()["data"]) == 1
    assert "user" not in response.json()


async def test_fields_of_openai_that_ask_for_nothing_are_accepted(draw):
    response = await draw(
        quality="auto", style="auto", background="opaque", moderation="auto", stream=False, partial_images=0
    )
    assert response.status_code == 200


async def test_deadline_from_the_header_unless_the_body_has_one(draw):
    def slo_ms(response):
        return response.json()["data"][0]["schedule"]["slo_ms"]

    assert slo_ms(await draw(headers={"X-SLO-Ms": "700.5"})) == 700.5
    assert slo_ms(await draw(headers={"X-SLO-Ms": "700"}, slo_ms=900)) == 900


async def test_the_request_id_is_echoed_in_body_and_header(draw):
    named = await draw(request_id="order 66")
    assert named.json()["id"] == named.headers["X-Request-Id"] == "order 66"
    by_header = await draw(headers={"X-Request-Id": "abc-1"})
    assert by_header.json()["id"] == by_header.headers["X-Request-Id"] == "abc-1"
    both = await draw(headers={"X-Request-Id": "abc-1"}, request_id="abc-2")
    assert both.json()["id"] == both.headers["X-Request-Id"] == "abc-2"


async def test_a_request_id_is_made_when_none_is_given(draw):
    first, second = await draw(), await draw()
    assert first.json()["id"] == first.headers["X-Request-Id"]
    assert first.json()["id"] != second.json()["id"]


async def test_the_same_request_id_may_be_used_twice_at_once(draw):
    responses = await asyncio.gather(*(draw(request_id="twin", seed=seed) for seed in (1, 2)))
    assert [response.status_code for response in responses] == [200, 200]
    assert [response.json()["data"][0]["seed"] for response in responses] == [1, 2]


@pytest.mark.parametrize("degrees", [1, [1]])
async def test_degrees_that_a_request_names_are_kept(draw, degrees):
    response = await draw(degrees=degrees)
    assert response.status_code == 200, response.text
    assert set(response.json()["data"][0]["schedule"]["degrees"]) == {1}


async def test_a_degree_that_is_not_served_is_refused_by_name(draw):
    response = await draw(degrees=[64])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "degrees"
