"""A client's mistakes: each is a 400 in OpenAI's envelope that names the field, and none is ever a 5xx."""

from __future__ import annotations

import json

import pytest
from fake_engine import FakeExecutor, make_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tetriserve.server import EngineSlot
from tetriserve.server.schemas import ImagesRequest
from tetriserve.server.uploads import MAX_BODY_BYTES

URL = "/v1/images/generations"
JSON = {"Content-Type": "application/json"}


def error_of(response, status, param, code="invalid_value"):
    """The envelope's content, checked for form."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["X-Request-Id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert error["message"]
    assert "\n" not in error["message"]
    return error["message"]


BAD_FIELDS = [
    ("prompt", None, "string"),
    ("prompt", 5, "string"),
    ("prompt", ["a"], "string"),
    ("prompt", "x" * 8001, "8000"),
    ("prompt", "\ud800", "surrogate"),
    ("n", 0, "1"),
    ("n", 11, "10"),
    ("n", "2", "integer"),
    ("n", 1.5, "integer"),
    ("n", True, "integer"),
    ("size", "big", "WIDTHxHEIGHT"),
    ("size", "0x64", "WIDTHxHEIGHT"),
    ("size", "64x-64", "WIDTHxHEIGHT"),
    ("size", "72x64", "multiples of 16"),
    ("size", "32x32", "64x64"),
    ("size", "512x512", "256x256"),
    ("size", "1024x16", "512"),
    ("size", "999999x999999", "16"),
    ("size", 512, "string"),
    ("size", [64, 64], "string"),
    ("seed", -2, "0 to 9223372036854775807, or -1"),
    ("seed", 2**63, "0 to 9223372036854775807"),
    ("seed", 10**400, "0 to 9223372036854775807"),
    ("seed", "7", "integer"),
    ("seed", 1.0, "integer"),
    ("num_inference_steps", 0, "1 to 200"),
    ("num_inference_steps", 201, "1 to 200"),
    ("num_inference_steps", True, "integer"),
    ("guidance_scale", -0.1, "0"),
    ("guidance_scale", 101, "100"),
    ("guidance_scale", "3", "number"),
    ("guidance_scale", True, "number"),
    ("guidance_scale", 10**400, "number"),
    ("negative_prompt", 5, "string"),
    ("negative_prompt", "x" * 8001, "8000"),
    ("negative_prompt", "\udfff", "surrogate"),
    ("true_cfg_scale", 4.0, "negative_prompt"),
    ("max_sequence_length", 0, "1 to 64"),
    ("max_sequence_length", 65, "1 to 64"),
    ("max_sequence_length", "8", "integer"),
    ("response_format", "file", "'b64_json' or 'url'"),
    ("output_format", "gif", "png"),
    ("output_format", "svg", "png"),
    ("output_compression", 101, "100"),
    ("output_compression", -1, "0"),
    ("width", 64, "height is required beside width"),
    ("height", 64, "width is required beside height"),
    ("width", 0, "1"),
    ("width", "64", "integer"),
    ("slo_ms", 0, "above 0"),
    ("slo_ms", -5, "above 0"),
    ("slo_ms", 1e12, "8.64e+07"),
    ("slo_ms", "1000", "number"),
    ("slo_ms", True, "number"),
    ("priority", 2_000_000, "1000000"),
    ("priority", "high", "integer"),
    ("deadline_policy", "strict", "best_effort"),
    ("request_id", "", "128 printable"),
    ("request_id", "x" * 129, "128 printable"),
    ("request_id", "a\nb", "128 printable"),
    ("request_id", "ünique", "128 printable"),
    ("request_id", 5, "string"),
    ("user", 5, "string"),
    ("user", "\ud83d", "surrogate"),
    ("quality", "ultra", "auto"),
    ("quality", 1, "auto"),
    ("style", "anime", "vivid"),
    ("background", "transparent", "opaque"),
    ("moderation", "high", "low"),
    ("complexity", "max", "low"),
    ("frame_count", 2, "one frame"),
    ("frame_duration_ms", 100, "one frame"),
    ("svg", {"model": "x"}, "png, jpeg or webp"),
    ("num_frames", 5, "1"),
    ("fps", "24", "number"),
    ("guidance_scale_2", "4", "number"),
    ("extra_args", "{", "JSON object"),
    ("extra_args", "[]", "JSON object"),
    ("extra_args", "[" * 100_000, "JSON object"),
    ("extra_args", {"cache": True}, "latent_seq_len"),
    ("extra_args", {"runtime_v2_deadline_ms": 5}, "numbers"),
    ("extra_args", {"runtime_v2_deadline_ms": "5", "runtime_v2_arrival_ms": 1}, "numbers"),
    ("safety_identifier", 5, "string"),
    ("stream", "yes", "boolean"),
    ("partial_images", 4, "3"),
    ("partial_images", 2, "stream"),
    ("steps", 5, "num_inference_steps"),
    ("\ud800", 5, ""),
]


@pytest.mark.parametrize(("field", "value", "hint"), BAD_FIELDS)
async def test_a_bad_field_is_named_with_what_is_allowed(client, field, value, hint):
    body = {"prompt": "a lighthouse", "size": "64x64", field: value}
    response = await client.post(URL, content=json.dumps(body), headers=JSON)
    missing = {"width": "height", "height": "width"}.get(field) if value == 64 else None
    param = None if field == "\ud800" else missing or field
    assert hint in error_of(response, 400, param)


async def test_a_prompt_is_required(client):
    assert "required" in error_of(await client.post(URL, json={"n": 1}), 400, "prompt")


async def test_an_unknown_model_is_named_beside_the_served_one(client):
    response = await client.post(URL, json={"prompt": "a lighthouse", "model": "dall-e-3"})
    message = error_of(response, 404, "model", "model_not_found")
    assert "dall-e-3" in message
    assert "tiny/flux" in message


async def test_true_cfg_scale_out_of_range(client):
    body = {"prompt": "a lighthouse", "negative_prompt": "fog", "true_cfg_scale": -0.5}
    error_of(await client.post(URL, json=body), 400, "true_cfg_scale")


@pytest.mark.parametrize(("header", "value"), [("X-SLO-Ms", "soon"), ("X-SLO-Ms", ""), ("X-Request-Id", "x" * 129)])
async def test_a_bad_header_is_named(client, header, value):
    response = await client.post(URL, json={"prompt": "a lighthouse"}, headers={header: value})
    error_of(response, 400, header)


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
async def test_a_header_with_an_impossible_deadline(client, value):
    response = await client.post(URL, json={"prompt": "a lighthouse"}, headers={"X-SLO-Ms": value})
    error_of(response, 400, "slo_ms")


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        (b"", "JSON object"),
        (b"{", "not valid JSON"),
        (b'{"prompt": }', "character 11"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"seed": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b"[]", "JSON object"),
        (b'"prompt"', "JSON object"),
        (b"null", "JSON object"),
        (b"7", "JSON object"),
    ],
)
async def test_a_body_that_is_no_json_object(client, body, hint):
    assert hint in error_of(await client.post(URL, content=body, headers=JSON), 400, None)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_numbers_that_are_no_numbers(client, constant):
    for field in ("slo_ms", "guidance_scale"):
        body = f'{{"prompt": "a lighthouse", "{field}": {constant}}}'
        error_of(await client.post(URL, content=body, headers=JSON), 400, field)


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "text/json"])
async def test_another_content_type_is_told_which_one_is_read(client, content_type):
    headers = {"Content-Type": content_type} if content_type else {}
    response = await client.post(URL, content=b'{"prompt": "a lighthouse"}', headers=headers)
    assert "application/json" in error_of(response, 400, None)


async def test_a_large_body_is_refused(client):
    body = b'{"prompt": "' + b"x" * MAX_BODY_BYTES + b'"}'
    message = error_of(await client.post(URL, content=body, headers=JSON), 413, None, "body_too_large")
    assert str(MAX_BODY_BYTES) in message


async def test_a_large_body_in_pieces_is_refused_before_it_is_read_to_its_end(client):
    num_sent = 0

    async def pieces():
        nonlocal num_sent
        for _ in range(1000):
            num_sent += 1
            yield b" " * 65536

    error_of(await client.post(URL, content=pieces(), headers=JSON), 413, None, "body_too_large")
    assert num_sent <= 18


async def test_unknown_paths_and_methods(client):
    assert "/v2/images" in error_of(await client.get("/v2/images"), 404, None, "not_found")
    error_of(await client.get("/v1/models/"), 404, "model", "model_not_found")
    response = await client.get(URL)
    error_of(response, 405, None, "method_not_allowed")
    assert response.headers["Allow"] == "POST"
    error_of(await client.delete("/health"), 405, None, "method_not_allowed")


async def test_a_refused_request_keeps_the_clients_id(client):
    response = await client.post(URL, json={"n": 1}, headers={"X-Request-Id": "mine"})
    error_of(response, 400, "prompt")
    assert response.headers["X-Request-Id"] == "mine"


async def test_a_client_cannot_write_lines_into_the_log(client, caplog):
    with caplog.at_level("DEBUG", "tetriserve"):
        await client.get("/v1/a%0AINFO%3A forged")
        await client.post(URL, json={"prompt": "a lighthouse", "size": "x\nforged"})
    messages = [record.getMessage() for record in caplog.records]
    assert len([message for message in messages if "forged" in message]) == 1
    assert not any("\n" in message for message in messages)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)
likely_values = st.sampled_from(
    [1, 0, 3, 10, 11, 2**31, 2**63 - 2, 10**310, 0.5, 1.0, "64x64", "80x48", "256x256", "auto", "png", "webp", "jpeg",
     "b64_json", "url", -1, "high", "reject", "best_effort", "a lighthouse", False, None, ""]
)  # fmt: skip
surrogates = st.text(st.characters(categories=["Cs", "Cc", "Ll"]), max_size=4)
fields = st.sampled_from(sorted(ImagesRequest.model_fields)) | st.text(max_size=5) | surrogates
bodies = st.dictionaries(fields, likely_values | json_values | surrogates, max_size=6)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=st.booleans().flatmap(lambda is_object: bodies if is_object else json_values), has_prompt=st.booleans())
async def test_no_json_body_is_the_servers_fault(connect, body, has_prompt):
    if has_prompt and isinstance(body, dict):
        body = {**body, "prompt": "a lighthouse"}
    engine = make_engine(FakeExecutor(takes_time=False))
    async with connect(EngineSlot(engine)) as client:
        response = await client.post(URL, content=json.dumps(body), headers=JSON)
    assert response.status_code in (200, 400, 404, 429), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) >= {"message", "type", "param", "code"}
    await engine.stop()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=st.binary(max_size=50), content_type=st.sampled_from(["application/json", "application/x+json", "a", ";"]))
async def test_no_bytes_are_the_servers_fault(client, body, content_type):
    response = await client.post(URL, content=body, headers={"Content-Type": content_type})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]
