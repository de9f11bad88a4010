"""Images as answers of a chat."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import openai
import pytest
from fake_engine import CARD, FAILING, outcomes_of, picture
from PIL import Image

from tetriserve.config import ApiConfig
from tetriserve.core.request import Shape
from tetriserve.server import EngineSlot
from tetriserve.server.chat import CHAT
from tetriserve.server.chat_schemas import ChatRequest

URL = "/v1/chat/completions"
MESSAGE = {"role": "user", "content": "a lighthouse"}
BODY = {"messages": [MESSAGE], "size": "64x64", "seed": 7}


def image_of(part) -> Image.Image:
    head, _, data = part["image_url"]["url"].partition(",")
    assert head.startswith("data:image/")
    return Image.open(io.BytesIO(base64.b64decode(data)))


async def test_the_answer_is_an_image_with_what_became_of_it(client):
    response = await client.post(URL, json={**BODY, "request_id": "mine"})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert set(answer) == {"id", "object", "created", "model", "choices", "usage"}
    assert (answer["id"], answer["object"], answer["model"]) == ("mine", "chat.completion", CARD.name)
    (choice,) = answer["choices"]
    assert (choice["index"], choice["finish_reason"], choice["message"]["role"]) == (0, "stop", "assistant")
    (part,) = choice["message"]["content"]
    assert (part["type"], part["seed"]) == ("image_url", 7)
    np.testing.assert_array_equal(np.asarray(image_of(part)), picture("a lighthouse", 7, Shape(64, 64)))
    runs = part["schedule"]["runs"]
    assert list(part["stage_durations"]) == ["queued", "encode", "denoise", "decode"]
    assert part["stage_durations"]["denoise"] == pytest.approx(runs[1]["end_s"] - runs[1]["start_s"])
    assert part["stage_durations"]["queued"] == part["schedule"]["queued_s"]
    assert answer["usage"] == {"prompt_tokens": 64, "completion_tokens": 16, "total_tokens": 80}


async def test_n_images_are_n_choices(client):
    choices = (await client.post(URL, json={**BODY, "n": 3})).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert [choice["message"]["content"][0]["seed"] for choice in choices] == [7, 8, 9]


async def test_fields_of_pictures_stand_beside_the_message_or_in_extra_body(client, engine):
    outcomes = outcomes_of(engine)
    nested = {"width": 128, "height": 64, "num_inference_steps": 3, "negative_prompt": "fog", "output_format": "webp"}
    answer = (await client.post(URL, json={"messages": [MESSAGE], "slo_ms": 60_000, "extra_body": nested})).json()
    request = outcomes[0].request
    assert (request.shape, request.num_steps, request.negative_prompt) == (Shape(64, 128), 3, "fog")
    assert request.deadline_s - request.arrival_s == pytest.approx(60.0)
    assert image_of(answer["choices"][0]["message"]["content"][0]).format == "WEBP"


async def test_a_field_may_be_given_twice_if_it_is_the_same(client):
    same = await client.post(URL, json={**BODY, "extra_body": {"seed": 7}})
    assert same.status_code == 200
    other = await client.post(URL, json={**BODY, "extra_body": {"seed": 8}})
    assert (other.status_code, other.json()["error"]["param"]) == (400, "seed")
    assert "extra_body" in other.json()["error"]["message"]


async def test_the_image_may_be_a_url(client):
    answer = (await client.post(URL, json={**BODY, "response_format": "url"})).json()
    url = answer["choices"][0]["message"]["content"][0]["image_url"]["url"]
    assert (await client.get(url)).content[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        ("a lighthouse", "a lighthouse"),
        ("", ""),
        ([{"type": "text", "text": "a lighthouse"}], "a lighthouse"),
        ([{"type": "text", "text": "a lighthouse"}, {"type": "text", "text": "at sea"}], "a lighthouse\nat sea"),
    ],
)
async def test_the_text_of_the_message_is_the_prompt(client, engine, content, prompt):
    outcomes = outcomes_of(engine)
    response = await client.post(URL, json={**BODY, "messages": [{"role": "user", "content": content}]})
    assert response.status_code == 200, response.text
    assert outcomes[0].request.prompt == prompt


REFUSED = [
    ({"messages": []}, "messages", "0 items; allowed: 1"),
    ({"messages": [MESSAGE, MESSAGE]}, "messages", "2 items; allowed: 1"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages", "'system'; allowed: 'user'"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages", "'text' with a text"),
    ({"messages": [{"role": "user", "content": []}]}, "messages", "no text"),
    ({"messages": [{"role": "user"}]}, "messages", "no text"),
    ({"messages": "a lighthouse"}, "messages", "list"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
    ({"stream": True}, "stream", "/v1/images/generations"),
    ({"extra_body": {"stream": True}}, "stream", "/v1/images/generations"),
    ({"tools": [{"type": "function"}]}, "tools", "not served"),
    ({"functions": [{"name": "f"}]}, "functions", "not served"),
    ({"function_call": "auto"}, "function_call", "not called"),
    ({"tool_choice": "required"}, "tool_choice", "'none' or 'auto'"),
    ({"audio": {"voice": "alloy"}}, "audio", "the answer is an image"),
    ({"prediction": {}}, "prediction", "the answer is an image"),
    ({"web_search_options": {}}, "web_search_options", "nothing is looked up"),
    ({"logprobs": True}, "logprobs", "served: False"),
    ({"modalities": ["text"]}, "modalities", "served: 'image'"),
    ({"response_format": {"type": "json_object"}}, "response_format", "'b64_json' or 'url'"),
    ({"background": "transparent"}, "background", "opaque"),
    ({"extra_body": {"steps": 4}}, "steps", "num_inference_steps"),
    ({"extra_body": {"num_frames": 16}}, "num_frames", "served: 1"),
    ({"extra_body": {"size": "3x3"}, "size": None}, "size", "multiples of 16"),
    ({"prompt": "a lighthouse"}, "prompt", "messages"),
    ({"n": 11}, "n", "10"),
]


@pytest.mark.parametrize(("fields", "param", "hint"), REFUSED)
async def test_what_is_not_served_is_refused_in_one_line(client, engine, fields, param, hint):
    body = json.dumps({**BODY, **fields})
    response = await client.post(URL, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert hint in error["message"]
    assert "\n" not in error["message"]
    assert engine.state.trajectories == ()


async def test_messages_are_required(client):
    response = await client.post(URL, json={"size": "64x64"})
    assert (response.status_code, response.json()["error"]["message"]) == (400, "messages is required")


TEXTUAL = [
    ("temperature", 0.7), ("top_p", 1), ("top_k", 5), ("frequency_penalty", 0), ("presence_penalty", 0.5),
    ("max_tokens", 100), ("max_completion_tokens", 100), ("stop", ["."]), ("stop", "."), ("logit_bias", {"5": 1}),
    ("top_logprobs", 2), ("reasoning_effort", "low"), ("verbosity", "low"), ("service_tier", "auto"), ("store", True),
    ("metadata", {"a": "b"}), ("prompt_cache_key", "k"), ("stream_options", {"include_usage": True}),
    ("parallel_tool_calls", True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), TEXTUAL)
async def test_what_is_of_texts_is_ignored_with_a_warning_or_refused_under_strict(connect, engine, client, name, value):
    answer = await client.post(URL, json={**BODY, name: value})
    assert answer.status_code == 200, answer.text
    (warning,) = answer.json()["warnings"]
    assert warning.startswith(f"{name} is ignored: ")
    async with connect(EngineSlot(engine), api=ApiConfig(compat="strict")) as strict:
        refused = await strict.post(URL, json={**BODY, name: value})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)


def test_every_parameter_that_may_be_ignored_is_tested():
    assert {name for name, _ in TEXTUAL} == set(CHAT) <= set(ChatRequest.model_fields)


async def test_another_model_is_a_404_as_everywhere(client):
    for path, body in (
        (URL, BODY), ("/v1/images/generations", {"prompt": "a"}), ("/v1/quotes", {"prompt": "a"}),
    ):  # fmt: skip
        response = await client.post(path, json={**body, "model": "gpt-image-2"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    response = await client.get("/v1/models/gpt-image-2")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_prompts_of_chats_are_in_no_log(client, caplog):
    caplog.set_level("DEBUG")
    for message in ("a very secret lighthouse", FAILING):
        await client.post(URL, json={**BODY, "messages": [{"role": "user", "content": message}], "stop": "secret word"})
    await client.post(URL, json={**BODY, "messages": [{"role": "a very secret role", "content": "x"}]})
    ours = [str(vars(record)) for record in caplog.records if record.name.startswith("tetriserve")]
    assert ours
    assert not any("secret" in text or FAILING in text for text in ours)


async def test_the_openai_package_reads_the_answer(live):
    async with openai.AsyncOpenAI(base_url=f"{await live.url}/v1", api_key="none", max_retries=0) as ai:
        answer = await ai.chat.completions.create(
            model=CARD.name, messages=[MESSAGE], extra_body={"size": "64x64", "seed": 7}, temperature=0.5
        )
        assert answer.usage.total_tokens == 80
        assert answer.warnings == ["temperature is ignored: it is of texts, and the answer is an image"]
        assert answer.choices[0].message.content[0]["image_url"]["url"].startswith("data:image/png;base64,")
        with pytest.raises(openai.BadRequestError, match="stream is true"):
            await ai.chat.completions.create(model=CARD.name, messages=[MESSAGE], stream=True)
