"""LoRAs over HTTP: how they are listed, named and refused, and what becomes of a request whose LoRA is gone."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import fake_engine
import pytest
from fake_engine import CARD, FakeExecutor, make_journalled_jobs
from pictures_sent import PNG, data_url

from tests.waiting import until
from tetriserve.core.errors import RequestFailed
from tetriserve.core.request import Lora
from tetriserve.engine import Generation
from tetriserve.engine.models import ServedModels
from tetriserve.journal import Key
from tetriserve.models.card import LoraFile
from tetriserve.server import EngineSlot
from tetriserve.workload.outcome import Status

SKETCH = LoraFile(name="sketch", file=Path("sketch.safetensors"), digest="5e")
NEON = LoraFile(name="neon/2", file=Path("neon.safetensors"), digest="0e")
WITH_LORAS = dataclasses.replace(CARD, loras=(SKETCH, NEON))


@pytest.fixture
def engine(engine):
    engine.models = ServedModels((dataclasses.replace(engine.intake, card=WITH_LORAS),))
    return engine


async def test_loras_are_listed_as_models_whose_parent_is_the_model(client):
    models = (await client.get("/v1/models")).json()["data"]
    assert [(model["id"], model["parent"]) for model in models] == [
        ("tiny/flux", None),
        ("sketch", "tiny/flux"),
        ("neon/2", "tiny/flux"),
    ]
    assert all(model["sizes"] == models[0]["sizes"] for model in models)
    assert (await client.get("/v1/models/neon/2")).json() == models[2]
    assert "safetensors" not in str(models)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"lora": None}, None),
        ({"lora": "sketch"}, Lora("sketch", 1.0, "5e")),
        ({"lora": {"name": "neon/2", "scale": 0.5}}, Lora("neon/2", 0.5, "0e")),
        ({"lora": {"name": "neon/2", "scale": 2}}, Lora("neon/2", 2.0, "0e")),
        ({"model": "sketch"}, Lora("sketch", 1.0, "5e")),
        ({"model": "sketch", "lora": {"name": "sketch", "scale": -1}}, Lora("sketch", -1.0, "5e")),
        ({"model": "tiny/flux", "lora": "sketch"}, Lora("sketch", 1.0, "5e")),
    ],
)
async def test_a_request_names_its_lora_by_the_field_or_as_its_model(draw, executor, fields, expected):
    response = await draw(**fields)
    assert response.status_code == 200
    assert {work.request.lora for command in executor.started for work in command.work} == {expected}


@pytest.mark.parametrize(
    ("fields", "message", "code"),
    [
        ({"lora": "photo"}, "lora 'photo' is not served; served: sketch, neon/2", "invalid_value"),
        ({"lora": {"name": "photo"}}, "lora 'photo' is not served; served: sketch, neon/2", "invalid_value"),
        ({"lora": {"name": "sketch", "scale": 11}}, "lora has scale 11.0; allowed: -10 to 10", "invalid_value"),
        (
            {"model": "sketch", "lora": "neon/2"},
            "lora is 'neon/2', but model is 'sketch'; leave one out",
            "invalid_value",
        ),
        ({"model": "photo"}, "model 'photo' is not served; served: 'tiny/flux', 'sketch', 'neon/2'", "model_not_found"),
    ],
)  # fmt: skip
async def test_an_unknown_lora_is_refused_with_those_that_are_served(draw, executor, fields, message, code):
    response = await draw(**fields)
    error = response.json()["error"]
    status = 404 if code == "model_not_found" else 400
    assert (response.status_code, error["message"], error["code"]) == (status, message, code)
    assert error["param"] in fields
    assert not executor.started


@pytest.mark.parametrize("lora", [3, ["sketch"], {"scale": 1.0}, {"name": "sketch", "weight": 1.0}, {"name": 1}])
async def test_a_lora_of_another_form_is_refused(draw, lora):
    response = await draw(lora=lora)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "lora")


def loras_of(executor):
    return {work.request.lora for command in executor.started for work in command.work}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"lora": "sketch"}, Lora("sketch", 1.0, "5e")),
        ({"model": "sketch"}, Lora("sketch", 1.0, "5e")),
        ({"lora[name]": "neon/2"}, Lora("neon/2", 1.0, "0e")),
        ({"lora[name]": "neon/2", "lora[scale]": "0.5"}, Lora("neon/2", 0.5, "0e")),
    ],
)
async def test_a_form_names_a_lora_for_its_pictures(client, executor, fields, expected):
    files = [("image", ("in.png", PNG, "image/png"))]
    response = await client.post(
        "/v1/images/edits", data={"prompt": "a lighthouse", "size": "64x64", **fields}, files=files
    )
    assert response.status_code == 200, response.text
    assert loras_of(executor) == {expected}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": "photo"}, "lora 'photo' is not served; served: sketch, neon/2"),
        ({"lora": "sketch", "lora[scale]": "1"}, "lora is given twice"),
        ({"lora[scale]": "1", "lora": "sketch"}, "lora is given twice"),
        ({"lora[name]": ["sketch", "sketch"]}, "lora is given twice"),
        ({"lora[name]": "sketch", "lora[scale]": "much"}, None),
        ({"lora[weight]": "1"}, None),
    ],
)
async def test_a_lora_of_another_form_in_a_form_is_refused(client, executor, fields, message):
    files = [("image", ("in.png", PNG, "image/png"))]
    response = await client.post("/v1/images/edits", data={"prompt": "a lighthouse", **fields}, files=files)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "lora")
    assert message in (None, error["message"])
    assert not executor.started


async def test_edits_in_json_chats_and_quotes_name_loras_too(client, executor):
    wanted, expected = {"lora": {"name": "neon/2", "scale": 0.5}}, {Lora("neon/2", 0.5, "0e")}
    drawing = {"prompt": "a lighthouse", "size": "64x64"}
    chat = {"messages": [{"role": "user", "content": "a lighthouse"}], "size": "64x64"}
    for url, body in (
        ("/v1/images/edits", {**drawing, **wanted, "image": data_url(PNG)}),
        ("/v1/chat/completions", {**chat, **wanted}),
        ("/v1/chat/completions", {**chat, "extra_body": wanted}),
        ("/v1/chat/completions", {**chat, **wanted, "extra_body": wanted}),
        ("/v1/quotes", {**drawing, **wanted}),
    ):
        executor.started.clear()
        response = await client.post(url, json=body)
        assert response.status_code == 200, response.text
        assert loras_of(executor) == (expected if url != "/v1/quotes" else set())
        assert "warnings" not in response.json(), "a LoRA is served, not ignored"
    differing = {**chat, "lora": "sketch", "extra_body": wanted}
    error = (await client.post("/v1/chat/completions", json=differing)).json()["error"]
    assert error["message"] == "lora differs from lora in extra_body; leave one out"
    for url, body in (
        ("/v1/chat/completions", {**chat, "extra_body": {"lora": "photo"}}),
        ("/v1/quotes", {**drawing, "lora": "photo"}),
    ):
        error = (await client.post(url, json=body)).json()["error"]
        assert (error["message"], error["param"]) == ("lora 'photo' is not served; served: sketch, neon/2", "lora")


async def test_without_loras_a_name_is_refused_too(connect, executor):
    engine = fake_engine.make_engine(executor)
    async with connect(EngineSlot(engine)) as client:
        response = await client.post("/v1/images/generations", json={"prompt": "a", "lora": "sketch"})
    assert response.json()["error"]["message"] == "lora 'sketch' is not served; served: none"
    await engine.stop()


KEY = Key("t", "k")
WANTED = [Generation(prompt="a lighthouse", size="64x64", lora=Lora("sketch", 0.5))]


async def begin_and_crash(directory: Path) -> None:
    """A server with LoRAs goes down while it works for a request with one."""
    executor = FakeExecutor()
    jobs = await make_journalled_jobs(executor, directory)
    executor.gate.clear()
    jobs.call(KEY, WANTED)
    await until(lambda: executor.started)
    await until(lambda: not jobs.journal.num_waiting)
    jobs.journal.close()
    await executor.stop()


async def test_a_resumed_request_has_its_lora(tmp_path, monkeypatch):
    monkeypatch.setattr(fake_engine, "CARD", WITH_LORAS)
    await begin_and_crash(tmp_path / "j")
    executor = FakeExecutor()
    jobs = await make_journalled_jobs(executor, tmp_path / "j")
    [image] = await jobs.call(KEY, WANTED).images()
    assert image.outcome.status is Status.FINISHED
    assert {work.request.lora for command in executor.started for work in command.work} == {Lora("sketch", 0.5, "5e")}
    await jobs.stop()


@pytest.mark.parametrize(
    "loras", [(), (NEON,), (dataclasses.replace(SKETCH, digest="other"),)], ids=["none", "others", "other weights"]
)
async def test_a_request_whose_lora_is_gone_fails_in_one_line_and_for_good(tmp_path, monkeypatch, caplog, loras):
    monkeypatch.setattr(fake_engine, "CARD", WITH_LORAS)
    await begin_and_crash(tmp_path / "j")
    for _ in range(2):
        monkeypatch.setattr(fake_engine, "CARD", dataclasses.replace(CARD, loras=loras))
        executor = FakeExecutor()
        with caplog.at_level(logging.ERROR):
            jobs = await make_journalled_jobs(executor, tmp_path / "j")
        with pytest.raises(RequestFailed) as caught:
            await jobs.call(KEY, WANTED).images()
        assert str(caught.value) == (
            "it was accepted with the LoRA 'sketch', with which this server was not started again: ask anew, or have "
            "it started with that --lora"
        )
        assert not executor.started
        assert jobs.count() == {"failed": 1}
        await jobs.stop()
    assert len([record for record in caplog.records if "was not taken up" in record.getMessage()]) == 1
