"""The load generators of vLLM-Omni, SGLang and GF-DiT get their images from this server as it is."""

from __future__ import annotations

import io

import pytest
from fake_engine import outcomes_of
from PIL import Image

from tests.peers import MODEL, PROMPT, asks


@pytest.mark.parametrize("ask", asks(128), ids=lambda ask: ask.name)
async def test_what_a_peers_client_sends_is_answered_with_what_it_reads(client, engine, ask):
    outcomes = outcomes_of(engine)
    response = await client.post(ask.path, json=ask.body, headers=ask.headers)
    assert response.status_code == 200, response.text
    images = [Image.open(io.BytesIO(file)) for file in ask.images_of(response.json())]
    assert len(images) == ask.body.get("n", 1) == len(outcomes)
    assert {image.size for image in images} == {(128, 128)}
    request = outcomes[0].request
    assert request.prompt == PROMPT
    asked = ask.body | ask.body.get("extra_body", {})
    assert request.num_steps == asked.get("num_inference_steps", 4)
    assert request.negative_prompt == asked.get("negative_prompt")
    assert asked.get("seed", request.seed) == request.seed
    if ask.deadline_s is not None:
        assert request.deadline_s - request.arrival_s == pytest.approx(ask.deadline_s)


async def test_what_they_ask_before_they_begin(client):
    """All wait for `/health`; SGLang's asks `/v1/model_info` for a name, and goes on without an answer."""
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/v1/model_info")).status_code == 404
    assert (await client.get(f"/v1/models/{MODEL}")).status_code == 200


async def test_a_video_is_not_taken_for_an_image(client):
    ask = next(ask for ask in asks(128) if ask.name == "vllm-omni with all options")
    body = ask.body | {"extra_body": ask.body["extra_body"] | {"num_frames": 80}}
    response = await client.post(ask.path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "num_frames")
