"""Pictures that come with a prompt: as files in a form, as data URLs in JSON, in chats and in quotes."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import zlib

import fake_engine
import numpy as np
import pytest
from fake_engine import CARD, FAILING, PROFILE, make_journalled_jobs, outcomes_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures_sent import PIXELS, PNG, data_url, file_of, pixels_of
from PIL import Image, ImageDraw
from safetensors.numpy import load

from tests.waiting import until
from tetriserve.config import ApiConfig
from tetriserve.core.request import Shape
from tetriserve.core.stages import ENCODE_IMAGE, INPUT
from tetriserve.engine import Intake
from tetriserve.engine.models import ServedModels
from tetriserve.profile import ProfileCost
from tetriserve.server import EngineSlot, create_app
from tetriserve.server.forms import MAX_PARTS
from tetriserve.server.pictures import MAX_PIXELS
from tetriserve.server.uploads import MAX_BODY_BYTES, MAX_PICTURES_BODY_BYTES, Uploads

URL = "/v1/images/edits"
BODY = {"prompt": "a lighthouse", "size": "64x64", "seed": "7"}
JSON_BODY = {"prompt": "a lighthouse", "size": "64x64", "seed": 7, "image": data_url(PNG)}


@pytest.fixture
def edit(client):
    """Post a form with these fields."""

    async def edit(files=PNG, headers=None, **fields):
        files = files if isinstance(files, list) else [("image", ("in.png", files, "image/png"))]
        return await client.post(URL, data={**BODY, **fields}, files=files, headers=headers)

    return edit


def seen(executor, number=-1):
    """The pictures that came with the request of a started task, as the store has them."""
    work = executor.started[number].work[0]
    return [pixels for _, pixels in sorted(load(executor.states.get(work.states[INPUT])).items())]


def error_of(response, param="image", status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert "\n" not in error["message"]
    return error["message"]


async def test_a_picture_in_a_form_comes_along_with_the_prompt(edit, engine, executor, caplog):
    caplog.set_level("INFO")
    outcomes = outcomes_of(engine)
    response = await edit(num_inference_steps="10", strength="0.35", n="2", slo_ms="60000", request_id="mine")
    assert response.status_code == 200, response.text
    answer = response.json()
    assert (answer["id"], answer["size"], [item["seed"] for item in answer["data"]]) == ("mine", "64x64", [7, 8])
    for outcome in outcomes:
        request = outcome.request
        assert (request.images, request.num_steps, request.skipped_steps) == ((Shape(48, 80),), 4, 6)
        assert request.deadline_s - request.arrival_s == pytest.approx(60.0)
        assert [run.task.stage for run in outcome.runs] == ["encode", ENCODE_IMAGE, "denoise", "decode"]
    np.testing.assert_array_equal(seen(executor)[0], PIXELS)
    assert "pictures=1 picture_sizes=80x48" in caplog.text


@pytest.mark.parametrize(
    "pictures",
    [
        {"image": data_url(PNG)},
        {"image": [data_url(PNG)]},
        {"image": {"url": data_url(PNG)}},
        {"image": {"image_url": data_url(PNG)}},
        {"images": [{"image_url": data_url(PNG)}]},
        {"images": [{"type": "image_url", "image_url": {"url": data_url(PNG)}}]},
        {"images": data_url(PNG, "jpeg")},
        {"image": data_url(PNG).replace("image/png", "IMAGE/PNG;charset=x")},
    ],
)
async def test_a_picture_in_json_is_the_same(client, edit, executor, pictures):
    response = await client.post(URL, json={**JSON_BODY, "image": None, **pictures})
    assert response.status_code == 200, response.text
    np.testing.assert_array_equal(seen(executor)[0], PIXELS)
    assert response.json()["data"][0]["b64_json"] == (await edit()).json()["data"][0]["b64_json"]


async def test_without_a_size_the_image_is_of_the_size_nearest_to_the_picture(edit, engine):
    outcomes = outcomes_of(engine)
    for height, width in ((100, 150), (512, 512), (20, 40)):
        assert (await edit(file_of(pixels_of(height, width)), size="auto")).status_code == 200
    sizes = [outcome.request.shape for outcome in outcomes]
    assert sizes == [Shape(96, 144), Shape(256, 256), Shape(48, 96)]


def drawn(mode):
    """A square on the left half, of the mode."""
    image = Image.new("RGB", (64, 32), "white")
    ImageDraw.Draw(image).rectangle((8, 8, 23, 23), "black")
    return image.convert(mode)


def transparent(mode):
    image = Image.new(mode, (64, 32), 0)
    image.paste(Image.new(mode, (32, 32), (0, 255) if mode == "LA" else (0, 0, 0, 255)), (0, 0))
    return image


def palette():
    image = Image.new("P", (64, 32), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(0, (0, 0, 32, 32))
    return image


HALF = np.concatenate([np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)], axis=1)
SQUARE = np.asarray(drawn("RGB"))
WIDE = Image.fromarray((np.arange(64, dtype=np.uint16).repeat(32).reshape(64, 32).T * 1040).astype(np.uint16))
FILES = {
    "grey": (file_of(drawn("L")), SQUARE),
    "two colours": (file_of(drawn("1")), SQUARE),
    "transparent": (file_of(transparent("RGBA")), HALF),
    "transparent webp": (file_of(transparent("RGBA"), "webp", lossless=True), HALF),
    "transparent grey": (file_of(transparent("LA")), HALF),
    "transparent palette": (file_of(palette(), transparency=1), HALF),
    "16 bits": (file_of(WIDE), (np.asarray(WIDE) / 257).astype(np.uint8)[:, :, None].repeat(3, 2)),
    "animated png": (file_of(drawn("RGB"), save_all=True, append_images=[Image.new("RGB", (64, 32))]), SQUARE),
    "animated webp": (
        file_of(drawn("RGB"), "webp", lossless=True, save_all=True, append_images=[Image.new("RGB", (64, 32))]),
        SQUARE,
    ),
}


@pytest.mark.parametrize("name", FILES)
async def test_files_of_any_mode_are_read_as_rgb_on_white_and_animations_by_their_first_frame(edit, executor, name):
    file, pixels = FILES[name]
    response = await edit(file)
    assert response.status_code == 200, response.text
    np.testing.assert_allclose(seen(executor)[0].astype(int), pixels, atol=1)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
async def test_jpegs_are_read(edit, executor, mode):
    assert (await edit(file_of(drawn(mode), "jpeg", quality=95))).status_code == 200
    assert np.abs(seen(executor)[0].astype(int) - SQUARE).mean() < 4


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
async def test_pictures_are_turned_as_their_exif_says(edit, executor, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if kind == "png" else {"quality": 95}
    response = await edit(file_of(drawn("RGB"), kind, exif=exif, **options))
    assert response.status_code == 200, response.text
    steps = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90,
    }  # fmt: skip
    turned = steps[orientation](SQUARE)
    assert seen(executor)[0].shape == turned.shape
    assert np.abs(seen(executor)[0].astype(int) - turned).mean() < 4


def png_of_size(width, height):
    """A file that says so, and has the pixels of a smaller one."""
    header = PNG[:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + PNG[24:29]
    return header + zlib.crc32(header[12:29]).to_bytes(4, "big") + PNG[33:]


GIF = file_of(drawn("P"), "gif")
BAD_FILES = {
    "empty": (b"", "no whole png, jpeg or webp"),
    "a text": (b"a very secret text", "no whole png"),
    "a gif": (GIF, "no whole png"),
    "a tiff": (file_of(drawn("RGB"), "tiff"), "no whole png"),
    "an eps, which a program would be started for": (file_of(drawn("RGB"), "eps"), "no whole png"),
    "truncated png": (PNG[:-40], "no whole png"),
    "truncated jpeg": (file_of(pixels_of(), "jpeg")[:-50], "no whole png"),
    "truncated webp": (file_of(pixels_of(), "webp")[:-50], "no whole png"),
    "larger than its pixels": (png_of_size(2000, 2000), "no whole png"),
    "a bomb": (png_of_size(30_000, 30_000), f"far too large; allowed: at most {MAX_PIXELS} pixels"),
    "a bomb by one pixel": (png_of_size(4097, 4096), "4097x4096; allowed"),
    "a larger bomb": (png_of_size(2**31 - 1, 2**31 - 1), "far too large"),
    "without pixels": (png_of_size(0, 5), "no whole png"),
    "too small": (file_of(pixels_of(8, 80)), "image is 80x8; allowed: at least 16 pixels a side"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_FILES)
async def test_a_file_that_cannot_be_used_is_refused_in_one_line(edit, client, executor, name):
    file, hint = BAD_FILES[name]
    for response in (await edit(file), await client.post(URL, json={**JSON_BODY, "image": data_url(file)})):
        assert hint in error_of(response)
    assert executor.started == []
    assert [key for key in executor.states.bundles if INPUT in key] == []


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    source=st.sampled_from([PNG, file_of(pixels_of(), "jpeg"), file_of(pixels_of(), "webp"), FILES["16 bits"][0]]),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4),
    cut=st.integers(0, 10**6),
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
async def test_no_damaged_file_is_the_servers_fault(client, source, edits, cut):
    file = bytearray(source)
    for at, data in edits:
        at %= len(file)
        file[at : at + len(data)] = data
    file = bytes(file[: 1 + cut % (2 * len(file))])
    response = await client.post(URL, data=BODY, files={"image": file})
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        error_of(response)


FORM_TYPES = [
    ("n", "0", "1"), ("n", "two", "integer"), ("n", "1.5", "integer"), ("n", "2 ", "integer"), ("n", "", "integer"),
    ("n", "true", "integer"), ("n", "1" * 5000, "integer"), ("n", "02", "integer"), ("n", "+2", "integer"),
    ("seed", "1e3", "integer"), ("seed", "-2", "-1 for any"), ("num_inference_steps", "0x10", "integer"),
    ("guidance_scale", "NaN", "number"), ("guidance_scale", "Infinity", "number"), ("guidance_scale", "1e999", "100"),
    ("guidance_scale", "3,5", "number"), ("strength", "0", "above 0, at most 1"), ("strength", "1.01", "at most 1"),
    ("strength", "half", "number"), ("slo_ms", "soon", "number"), ("stream", "yes", "boolean"),
    ("stream", "1", "boolean"), ("stream", "True", "boolean"), ("partial_images", "2", "stream"),
    ("size", "63x64", "multiples of 16"), ("output_format", "gif", "png"), ("background", "transparent", "opaque"),
    ("degrees", "3", "1, 2"), ("degrees", "[1]", "list"), ("width", "64", "height is required"),
    ("prompt", "x" * 70_000, "65536"), ("prompt", "x" * 9000, "8000"), ("steps", "5", "num_inference_steps"),
    ("deadline_policy", "never", "best_effort"), ("svg[model]", "x", "png, jpeg or webp"),
    ("frame_count", "3", "one frame"), ("image_url", "http://x", "unknown field"), ("file_id", "x", "unknown field"),
    ("images", data_url(PNG), "files called image"), ("quality", "ultra", "auto"), ("extra_args", "{", "JSON object"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "hint"), FORM_TYPES)
async def test_what_a_form_says_is_as_strict_as_json_and_named(edit, executor, field, value, hint):
    response = await edit(**{field: value})
    param = {"width": "height", "svg[model]": "svg"}.get(field, field)
    assert hint in error_of(response, param)
    assert executor.started == []


async def test_numbers_and_booleans_of_a_form_are_taken(edit, engine):
    outcomes = outcomes_of(engine)
    fields = {
        "n": "1", "num_inference_steps": "6", "guidance_scale": "2", "negative_prompt": "5", "priority": "-1",
        "true_cfg_scale": "2.5e0", "max_sequence_length": "32", "degrees[]": ["1", "2"], "output_compression": "100",
        "stream": "false", "user": "true", "extra_args": "{}", "num_frames": "1", "width": "64", "height": "64",
    }  # fmt: skip
    response = await edit(**fields)
    assert response.status_code == 200, response.text
    request = outcomes[0].request
    assert (request.guidance_scale, request.true_cfg_scale, request.negative_prompt) == (2, 2.5, "5")
    assert (request.degrees, request.priority, request.max_sequence_length) == ((1, 2), -1, 32)
    assert response.json()["user"] == "true"


@pytest.mark.parametrize("compat", ["lenient", "strict"])
@pytest.mark.parametrize("name", ["mask", "markup"])
async def test_masks_are_refused_whatever_compat_says(connect, engine, compat, name):
    async with connect(EngineSlot(engine), api=ApiConfig(compat=compat)) as client:
        form = await client.post(URL, data=BODY, files={"image": PNG, name: PNG})
        as_json = await client.post(URL, json={**JSON_BODY, name: {"image_url": data_url(PNG)}})
    for response in (form, as_json):
        assert error_of(response, name).startswith(f"{name} is not served: ")


async def test_fidelity_is_a_level_that_is_ignored_with_a_warning_or_refused_under_strict(connect, engine, edit):
    plain = (await edit()).json()["data"][0]["b64_json"]
    high = (await edit(input_fidelity="high")).json()
    assert high["warnings"] == ["input_fidelity 'high' is ignored: one fidelity is served"]
    assert high["data"][0]["b64_json"] == plain
    assert "warnings" not in (await edit(input_fidelity="low")).json()
    error_of(await edit(input_fidelity="medium"), "input_fidelity")
    async with connect(EngineSlot(engine), api=ApiConfig(compat="strict")) as client:
        refused = await client.post(URL, data={**BODY, "input_fidelity": "high"}, files={"image": PNG})
    assert "served: 'low'" in error_of(refused, "input_fidelity")


BAD_JSON = [
    ({"image": "http://example.org/secret.png"}, "image", "nothing is fetched"),
    ({"image": "HTTPS://example.org/secret.png"}, "image", "nothing is fetched"),
    ({"image": "file:///etc/passwd"}, "image", "no data URL"),
    ({"image": "secret"}, "image", "no data URL"),
    ({"image": "data:image/png,secret"}, "image", "no data URL"),
    ({"image": "data:image/png;base64,secret!"}, "image", "base64"),
    ({"image": "data:image/png;base64,c2VjcmV0"}, "image", "no whole png"),
    ({"image": 5}, "image", "data URL"),
    ({"image": {"file_id": "secret"}}, "image", "data URL"),
    ({"image": {"url": 5}}, "image", "data URL"),
    ({"image": {"image_url": {"image_url": "secret"}}}, "image", "data URL"),
    ({"image": [["secret"]]}, "image", "data URL"),
    ({"image": [data_url(PNG)] * 17}, "image", "more than 16"),
    ({"image": [data_url(PNG)] * 2}, "image", "2 pictures came with the prompt; tiny/flux takes 0 to 1"),
    ({"images": [data_url(PNG)]}, "images", "leave one out"),
    ({"image": None, "images": ["secret"]}, "images", "no data URL"),
    ({"image": None, "images": [{"file_id": "secret"}]}, "images", "data URL"),
    ({"image": None}, "image", "image is required"),
    ({"image": []}, "image", "image is required"),
    ({"prompt": None}, "prompt", "string"),
    ({"n": "1"}, "n", "integer"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "hint"), BAD_JSON)
async def test_json_that_is_not_served_is_refused_without_a_word_of_what_it_holds(client, fields, param, hint, caplog):
    caplog.set_level("DEBUG")
    message = error_of(await client.post(URL, json={**JSON_BODY, **fields}), param)
    assert hint in message
    assert "secret" not in message
    assert "passwd" not in message
    ours = [str(vars(record)) for record in caplog.records if record.name.startswith("tetriserve")]
    assert ours
    assert not any("secret" in text for text in ours)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff"])
async def test_a_body_that_is_no_json_object_is_refused(client, body):
    error_of(await client.post(URL, content=body, headers={"Content-Type": "application/json"}), None)


FORM = "multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n'
BAD_FORMS = [
    (FORM, b"", "before its last boundary"),
    (FORM, PART, "before its last boundary"),
    (FORM, PART + b"--", "before its last boundary"),
    (FORM, b"secret", "no form"),
    (FORM, b"--y\r\n", "no form"),
    (FORM, b"--x\r\n\r\na\r\n--x--\r\n", "no name"),
    (FORM, b'--x\r\nContent-Disposition: form-data; name="\xff"\r\n\r\na\r\n--x--\r\n', "UTF-8"),
    (FORM, b"--x\r\nContent-Disposition: " + b"a" * 10_000 + b"\r\n\r\na\r\n--x--\r\n", "no form"),
    (FORM, b"--x\r\n" + b"A: b\r\n" * 100 + b"\r\na\r\n--x--\r\n", "no form"),
    (FORM, PART * (MAX_PARTS + 1) + b"--x--\r\n", f"more than {MAX_PARTS} parts"),
    ("multipart/form-data", PART + b"--x--\r\n", "no boundary"),
    (f"multipart/form-data; boundary={'x' * 300}", PART, "no form"),
    ("text/plain", b"a", "multipart/form-data or application/json"),
    ("", b"a", "multipart/form-data or application/json"),
]  # fmt: skip


@pytest.mark.parametrize(("content_type", "body", "hint"), BAD_FORMS)
async def test_a_form_that_cannot_be_read_is_refused(client, content_type, body, hint):
    message = error_of(await client.post(URL, content=body, headers={"Content-Type": content_type}), None)
    assert hint in message
    assert "secret" not in message


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=st.lists(st.sampled_from([PART, b"--x", b"--x--", b"\r\n", b"\r", b"-", b": ", b'"', b"a", b"\x00"])))
async def test_no_form_is_the_servers_fault(client, body):
    response = await client.post(URL, content=b"".join(body), headers={"Content-Type": FORM})
    assert response.status_code == 400, response.text


async def test_a_form_names_what_is_missing_twice_or_a_file(edit, client):
    missing = await client.post(URL, data={"size": "64x64"}, files={"image": PNG})
    assert error_of(missing, "prompt") == "prompt is required"
    assert "required" in error_of(await client.post(URL, files={"prompt": (None, "a")}))
    twice = [("image", PNG), ("n", (None, "1")), ("n", (None, "2"))]
    assert "twice" in error_of(await edit(twice), "n")
    assert "is a file" in error_of(await edit([("image", PNG), ("user", ("a.txt", b"a"))]), "user")
    assert "UTF-8" in error_of(await edit([("image", PNG), ("user", (None, b"\xff"))]), "user")


async def test_several_pictures_come_in_their_order_under_either_name(connect, engine, executor):
    engine.models = ServedModels((dataclasses.replace(engine.intake, card=dataclasses.replace(CARD, max_images=3)),))
    pictures = [pixels_of(seed=seed) for seed in range(3)]
    async with connect(EngineSlot(engine)) as client:
        for name in ("image", "image[]"):
            files = [(name, (f"{number}.png", file_of(each))) for number, each in enumerate(pictures)]
            response = await client.post(URL, data=BODY, files=files)
            assert response.status_code == 200, response.text
            for ours, theirs in zip(seen(executor), pictures, strict=True):
                np.testing.assert_array_equal(ours, theirs)
        files[1] = ("image[]", ("1.png", b"no picture"))
        assert "image 2 of 3 is no whole" in error_of(await client.post(URL, data=BODY, files=files))


async def test_a_model_that_takes_no_pictures_refuses_them_before_it_looks_at_them(connect, engine):
    engine.models = ServedModels((dataclasses.replace(engine.intake, card=dataclasses.replace(CARD, max_images=0)),))
    async with connect(EngineSlot(engine)) as client:
        response = await client.post(URL, data=BODY, files={"image": b"whatever"})
        assert error_of(response) == "image: tiny/flux takes no pictures"
        (model,) = (await client.get("/v1/models")).json()["data"]
    assert (model["min_images"], model["max_images"], model["default_strength"]) == (0, 0, None)


async def test_a_profile_without_pictures_is_named_and_how_to_mend_it(connect, engine):
    rows = tuple(row for row in PROFILE.rows if row.stage != ENCODE_IMAGE)
    intake = Intake(card=CARD, cost=ProfileCost(dataclasses.replace(PROFILE, rows=rows)))
    engine.models = ServedModels((intake,))
    async with connect(EngineSlot(engine)) as client:
        response = await client.post(URL, data=BODY, files={"image": PNG})
        assert "measure it again: tetriserve serve --remeasure" in error_of(response)
        (model,) = (await client.get("/v1/models")).json()["data"]
    assert model["max_images"] == 0


async def test_models_say_what_pictures_they_take(client):
    (model,) = (await client.get("/v1/models")).json()["data"]
    assert (model["min_images"], model["max_images"], model["default_strength"]) == (0, 1, 0.6)


async def test_strength_without_a_picture_is_refused(draw):
    assert "no picture came along" in error_of(await draw(strength=0.5), "strength")


def events_of(response):
    assert response.headers["Content-Type"].startswith("text/event-stream")
    return [json.loads(block.split("data: ", 1)[1]) for block in response.text.split("\n\n")[:-1]]


async def test_a_stream_has_openais_names_of_edits(edit):
    fields = {"size": "256x256", "stream": "true", "partial_images": "2", "num_inference_steps": "100"}
    events = events_of(await edit(**fields))
    types = [event["type"] for event in events]
    assert set(types) == {"image_edit.progress", "image_edit.partial_image", "image_edit.completed"}
    assert types[-1] == "image_edit.completed"
    stages = list(dict.fromkeys(event["stage"] for event in events if "stage" in event))
    assert stages == ["encode", ENCODE_IMAGE, "denoise", "decode"]
    plain = (await edit(**{**fields, "stream": "false", "partial_images": "0"})).json()
    assert events[-1]["b64_json"] == plain["data"][0]["b64_json"]


async def test_the_image_may_be_a_url_and_of_any_format(edit, client):
    answer = (await edit(response_format="url", output_format="webp")).json()
    file = (await client.get(answer["data"][0]["url"])).content
    assert Image.open(io.BytesIO(file)).format == "WEBP"


async def test_a_failure_is_answered_as_everywhere(edit):
    response = await edit(prompt=FAILING)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")


async def test_a_deadline_that_cannot_be_promised_is_refused_and_its_picture_goes(edit, executor):
    response = await edit(slo_ms="1", deadline_policy="reject")
    assert (response.status_code, response.json()["error"]["code"]) == (429, "deadline_infeasible")
    assert [key for key in executor.states.bundles if INPUT in key] == []


async def test_a_quote_counts_the_picture(connect, executor, monkeypatch):
    rows = [
        dataclasses.replace(row, seconds=1000.0) if row.stage == ENCODE_IMAGE else row
        for row in fake_engine.PROFILE.rows
    ]
    monkeypatch.setattr(fake_engine, "PROFILE", dataclasses.replace(fake_engine.PROFILE, rows=tuple(rows)))
    asked = {**JSON_BODY, "slo_ms": 60_000, "input_fidelity": "high"}
    without = {name: value for name, value in asked.items() if name != "image"}
    async with connect(EngineSlot(fake_engine.make_engine(executor))) as client:
        with_picture = (await client.post("/v1/quotes", json=asked)).json()
        plain = (await client.post("/v1/quotes", json=without)).json()
        assert 990_000 < with_picture["predicted_finish_ms"] - plain["predicted_finish_ms"] < 1_010_000
        assert [warning.split()[0] for warning in with_picture["warnings"]] == ["input_fidelity"]
        assert "no data URL" in error_of(await client.post("/v1/quotes", json={**asked, "image": "x"}))
        refused = await client.post("/v1/quotes", json={**asked, "mask": "x"})
        assert error_of(refused, "mask").startswith("mask is not served")


async def test_a_quote_and_an_edit_of_another_model_are_a_404(client, edit):
    error_of(await edit(model="gpt-image-2"), "model", 404)
    error_of(await client.post("/v1/quotes", json={**JSON_BODY, "model": "gpt-image-2"}), "model", 404)


CHAT = {"size": "64x64", "seed": 7}


def message(*parts):
    return [{"role": "user", "content": [{"type": "text", "text": "a lighthouse"}, *parts]}]


@pytest.mark.parametrize("url", [data_url(PNG), {"url": data_url(PNG)}, {"url": data_url(PNG), "detail": "auto"}])
async def test_a_chat_may_bring_a_picture(client, edit, executor, url):
    body = {"messages": message({"type": "image_url", "image_url": url}), **CHAT, "extra_body": {"strength": 0.6}}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    np.testing.assert_array_equal(seen(executor)[0], PIXELS)
    (part,) = response.json()["choices"][0]["message"]["content"]
    plain = (await edit()).json()["data"][0]["b64_json"]
    assert part["image_url"]["url"] == f"data:image/png;base64,{plain}"
    assert list(part["stage_durations"]) == ["queued", "encode", ENCODE_IMAGE, "denoise", "decode"]


@pytest.mark.parametrize(
    ("part", "hint"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.org/secret"}}, "nothing is fetched"),
        ({"type": "image_url", "image_url": {"url": data_url(b"secret")}}, "no whole png"),
        ({"type": "image_url", "image_url": 5}, "data URL"),
        ({"type": "image_url"}, "allowed"),
        ({"type": "text", "image_url": data_url(PNG)}, "allowed"),
    ],
)
async def test_a_chats_picture_that_cannot_be_used_is_refused(client, part, hint):
    response = await client.post("/v1/chat/completions", json={"messages": message(part), **CHAT})
    message_ = error_of(response, "messages")
    assert hint in message_
    assert "secret" not in message_


async def test_bodies_with_pictures_may_be_larger_than_others_and_not_without_end(client, edit):
    noise = np.random.default_rng(0).integers(0, 256, (800, 800, 3), np.uint8)
    assert len(file_of(noise)) > MAX_BODY_BYTES
    assert (await edit(file_of(noise))).status_code == 200
    assert (await client.post(URL, json={**JSON_BODY, "image": data_url(file_of(noise))})).status_code == 200
    large = await edit(PNG + bytes(MAX_PICTURES_BODY_BYTES))
    assert str(MAX_PICTURES_BODY_BYTES) in error_of(large, None, 413)
    elsewhere = await client.post("/v1/images/generations", json={**JSON_BODY, "image": data_url(file_of(noise))})
    assert str(MAX_BODY_BYTES) in error_of(elsewhere, None, 413)


async def test_large_bodies_are_in_memory_until_they_are_decoded_and_so_many_at_once(
    connect, engine, executor, monkeypatch
):
    noise = file_of(np.random.default_rng(0).integers(0, 256, (800, 800, 3), np.uint8))
    uploads = Uploads(max_bytes=len(noise) + 2**16)
    monkeypatch.setattr("tetriserve.server.app.Uploads", lambda: uploads)
    executor.gate.clear()
    async with connect(EngineSlot(engine)) as client:

        async def edit():
            return await client.post(URL, data=BODY, files={"image": noise})

        waiting = []
        for number in range(2):  # the first is decoded when the second comes
            waiting.append(asyncio.create_task(edit()))
            await until(lambda: len(engine.state.trajectories) == number + 1)  # noqa: B023
            assert uploads.num_bytes == 0
        uploads.num_bytes = 2**16
        refused = await edit()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert refused.headers["Retry-After"] == "1"
        assert uploads.num_bytes == 2**16
        uploads.num_bytes = 0
        executor.gate.set()
        assert [(await each).status_code for each in waiting] == [200, 200]
    assert uploads.num_bytes == 0


async def test_the_store_has_no_room_for_a_picture(edit, executor):
    executor.states.has_room = False
    response = await edit()
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    assert "no room for the pictures" in response.json()["error"]["message"]
    assert response.headers["Retry-After"] == "1"
    executor.states.has_room = True
    assert (await edit()).status_code == 200


async def test_under_a_key_a_picture_is_edited_once_and_another_one_is_refused(connect, executor, tmp_path):
    jobs = await make_journalled_jobs(executor, tmp_path / "journal")
    async with connect(EngineSlot(jobs.engine, jobs)) as client:

        async def edit(file, **fields):
            headers = {"Idempotency-Key": "k"}
            return await client.post(URL, data={**BODY, **fields}, files={"image": file}, headers=headers)

        first = await edit(PNG)
        assert first.status_code == 200, first.text
        again = await edit(file_of(PIXELS, "webp", lossless=True), slo_ms="5000")  # the same pixels
        assert again.json()["data"] == first.json()["data"]
        other = await edit(file_of(pixels_of(seed=1)))
        assert error_of(other, "Idempotency-Key", 422)
        assert error_of(await edit(PNG, strength="0.5"), "Idempotency-Key", 422)
    num_starts = len(executor.started)
    assert num_starts == 4
    await jobs.stop()


async def test_a_client_that_leaves_while_it_sends_is_no_error(connect, engine):
    sent = base64.b64encode(PNG)

    async def receive():
        return messages.pop(0)

    messages = [
        {"type": "http.request", "body": sent, "more_body": True}, {"type": "http.disconnect"},
    ]  # fmt: skip
    scope = {
        "type": "http", "method": "POST", "path": URL, "raw_path": URL.encode(), "query_string": b"", "scheme": "http",
        "headers": [(b"content-type", FORM.encode())], "server": ("server", 80), "client": ("client", 1),
        "http_version": "1.1",
    }  # fmt: skip
    answers = []

    async def send(message):
        answers.append(message)

    await create_app(EngineSlot(engine))(scope, receive, send)
    assert answers[0]["status"] == 499
    assert engine.state.trajectories == ()
