"""A server of several models: each call has one, which answers, metrics, board, traces and the journal name."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
from fake_engine import CARD, HELD, FakeExecutor, make_engine, make_journalled_jobs
from pictures_sent import PNG, data_url
from prometheus_client.parser import text_string_to_metric_families

from tests.waiting import HANG_S, until
from tetriserve.core.errors import ConfigError, RequestFailed, UnknownModel
from tetriserve.core.memory import Component, RankMemory
from tetriserve.core.request import Shape
from tetriserve.engine import Generation
from tetriserve.engine.models import ServedModels
from tetriserve.journal import Journal, Key, Model
from tetriserve.models.card import LoraFile
from tetriserve.policies.registry import POLICIES
from tetriserve.server import EngineSlot
from tetriserve.server.board.hub import BoardHub
from tetriserve.server.recent import RecentRuns

GENERATIONS = "/v1/images/generations"
SKETCH = LoraFile(name="sketch", file=Path("sketch.safetensors"), digest="5e")
FAST = dataclasses.replace(
    CARD, key="fast", name="fast", aliases=("quick",), path=Path("/models/fast"), max_images=0, fingerprint="fa57"
)
FINE = dataclasses.replace(
    CARD, key="fine", name="fine", path=Path("/models/fine"), num_text_tokens=32, loras=(SKETCH,), fingerprint="f19e",
    sizes=(Shape(256, 256), Shape(64, 64)), default_num_steps=2, ranks=(1,),
)  # fmt: skip
CARDS = (FAST, FINE)
BODY = {"prompt": "a lighthouse", "size": "64x64", "slo_ms": 60_000}


@pytest.fixture
async def engine(executor):
    for rank in (0, 1):
        cards = [card for card in CARDS if rank in (card.ranks or (0, 1))]
        held = tuple(dataclasses.replace(part, model=card.key) for card in cards for part in HELD)
        executor.memory[rank] = RankMemory(held, 7 + rank)
    engine = make_engine(executor, cards=CARDS)
    yield engine
    executor.gate.set()
    await engine.stop()


def models_of(executor: FakeExecutor) -> list[str]:
    """Of the requests whose tasks were started, in order of their first ones."""
    requests = [work.request for command in executor.started for work in command.work]
    return list({request.request_id: request.model for request in requests}.values())


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (None, "fast"),
        ("default", "fast"),
        ("fast", "fast"),
        ("quick", "fast"),
        ("/models/fast", "fast"),
        ("fine", "fine"),
        ("/models/fine", "fine"),
        ("sketch", "fine"),
    ],
)
async def test_a_call_is_for_the_model_that_it_names(draw, executor, name, key):
    response = await draw(model=name)
    assert (response.status_code, response.json()["model"]) == (200, key)
    assert models_of(executor) == [key]
    num_text = {"fast": 64, "fine": 32}[key]
    assert response.json()["usage"]["input_tokens_details"]["text_tokens"] == num_text


async def test_without_a_name_pictures_go_to_the_first_model_that_takes_them(client, executor):
    body = {**BODY, "image": data_url(PNG)}
    assert (await client.post("/v1/images/edits", json=body)).json()["model"] == "fine"
    chat = {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "a lighthouse"}, {"type": "image_url", "image_url": {"url": data_url(PNG)}}
    ]}], "size": "64x64"}  # fmt: skip
    assert (await client.post("/v1/chat/completions", json=chat)).json()["model"] == "fine"
    assert (await client.post("/v1/quotes", json=body)).json()["model"] == "fine"
    refused = await client.post("/v1/images/edits", json={**body, "model": "fast"})
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, "image: fast takes no pictures")
    plain = {"messages": [{"role": "user", "content": "a lighthouse"}], "size": "64x64", "model": "quick"}
    assert (await client.post("/v1/chat/completions", json=plain)).json()["model"] == "fast"
    assert models_of(executor) == ["fine", "fine", "fast"]


async def test_the_model_without_a_name_is_chosen_by_what_is_asked_for(engine):
    fast, fine = engine.models.intakes
    clip, film = (
        dataclasses.replace(intake, card=dataclasses.replace(intake.card, frame_step=4, name=name, key=name, loras=()))
        for intake, name in ((fast, "clip"), (fine, "film"))
    )
    models = ServedModels((clip, fast, film, fine))
    cases = [(name, makes_videos, num_images) for name in (None, "film", "fine") for makes_videos in (False, True)
             for num_images in (0, 1)]  # fmt: skip
    chosen = {}
    for case in cases:
        with contextlib.suppress(UnknownModel):
            chosen[case] = models.chosen(case[0], makes_videos=case[1], num_images=case[2])
    assert chosen == {
        (None, False, 0): (fast, None),
        (None, False, 1): (fine, None),
        (None, True, 0): (clip, None),
        (None, True, 1): (film, None),
        ("film", True, 0): (film, "film"),
        ("film", True, 1): (film, None),
        ("fine", False, 0): (fine, "fine"),
        ("fine", False, 1): (fine, None),
    }, "None is how a call names the model that it gets without a name"


async def test_an_unknown_name_is_told_the_names_that_are_served(client, draw):
    message = "model 'flux' is not served; served: 'fast', 'fine', 'sketch'"
    for response in (
        await draw(model="flux"),
        await client.post("/v1/quotes", json={**BODY, "model": "flux"}),
        await client.post("/v1/images/edits", json={**BODY, "model": "flux", "image": data_url(PNG)}),
        await client.get("/v1/models/flux"),
    ):
        assert response.status_code == 404
        error = response.json()["error"]
        assert (error["code"], error["param"], error["message"]) == ("model_not_found", "model", message)


async def test_a_model_of_videos_draws_no_images(client, draw, engine):
    clips = dataclasses.replace(CARD, key="clips", name="clips", frame_step=4, max_frames=81)
    fast, fine = engine.models.intakes
    engine.models = ServedModels((dataclasses.replace(fast, card=clips), fine))
    response = await draw(model="clips")
    assert response.status_code == 404
    assert response.json()["error"]["message"] == "model 'clips' does not make images; served: 'fine', 'sketch'"
    assert (await draw()).json()["model"] == "fine"
    assert (await client.get("/v1/models/clips")).json()["id"] == "clips"


async def test_a_lora_is_of_its_model_alone(draw):
    assert (await draw(model="fine", lora="sketch")).status_code == 200
    refused = await draw(model="fast", lora="sketch")
    assert (refused.status_code, refused.json()["error"]["message"]) == (
        400, "lora 'sketch' is not served; served: none"
    )  # fmt: skip


async def test_models_are_listed_each_with_its_own_facts_and_memory(client):
    listed = (await client.get("/v1/models")).json()["data"]
    assert [(model["id"], model["parent"]) for model in listed] == [
        ("fast", None), ("quick", None), ("fine", None), ("sketch", "fine")
    ]  # fmt: skip
    fast, quick, fine, sketch = listed
    assert fast == {**quick, "id": "fast"}
    facts = ("max_images", "default_num_inference_steps")
    assert [[model[name] for name in facts] for model in (fast, fine)] == [[0, 4], [1, 2]]
    assert [model["sizes"][0] for model in (fast, fine)] == ["128x128", "256x256"]
    assert (fast["num_ranks"], fine["num_ranks"]) == (2, 1)
    parts = {"transformer": 3_000_000, "vae": 500_000, "text_encoder": 1000}
    stages = ["encode", "denoise", "encode_image", "decode"]
    assert fast["memory"] == [
        {"ranks": [0, 1], "stages": stages, "components": parts, "total": 3_501_000, "resident": [7, 8]}
    ]
    assert fine["memory"] == [
        {"ranks": [1], "stages": stages, "components": parts, "total": 3_501_000, "resident": [8]}
    ]
    for name, model in (("quick", fast), ("/models/fine", fine), ("sketch", sketch), ("default", fast)):
        assert (await client.get(f"/v1/models/{name}")).json() == model


async def test_tasks_keep_to_the_ranks_of_their_model(draw, executor):
    await asyncio.gather(*(draw(model=model, seed=seed) for seed in range(3) for model in ("fast", "fine")))
    ranks = {(command.work[0].request.model, rank) for command in executor.started for rank in command.task.ranks}
    assert ranks == {("fast", 0), ("fast", 1), ("fine", 1)}


@pytest.mark.parametrize(
    "policy", [name for name in POLICIES if name not in ("fixed", "exhaustive")] + ["fixed:1", "fixed:2"]
)
async def test_every_policy_serves_a_model_that_one_rank_holds_beside_one_that_all_hold(policy):
    executor = FakeExecutor()
    engine = make_engine(executor, policy=policy, cards=CARDS)
    asked = [Generation(prompt="a lighthouse", size="64x64", model=card.key) for card in CARDS * 3]
    async with asyncio.timeout(HANG_S):
        await asyncio.gather(*map(engine.generate, asked))
    await engine.stop()
    ranks = {(command.work[0].request.model, rank) for command in executor.started for rank in command.task.ranks}
    assert ("fine", 0) not in ranks and {("fast", 0), ("fine", 1)} <= ranks


async def test_streams_count_the_tokens_of_their_model(client):
    body = {**BODY, "stream": True, "model": "fine", "partial_images": 1, "num_inference_steps": 4}
    text = (await client.post(GENERATIONS, json=body)).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1]["usage"]["input_tokens_details"]["text_tokens"] == 32


async def test_quotes_are_of_the_model_that_would_draw(client):
    quotes = {
        model: (await client.post("/v1/quotes", json={**BODY, "model": model})).json() for model in ("fast", "fine")
    }
    assert [(quote["model"], quote["feasible"]) for quote in quotes.values()] == [("fast", True), ("fine", True)]
    assert [len(quote["data"][0]["degrees"]) for quote in quotes.values()] == [4, 2]


async def test_metrics_are_labelled_by_model_and_their_sizes_are_each_models_own(client, draw):
    for model, size in (("fast", "128x128"), ("fine", "64x64"), ("fine", "64x64"), ("fine", "80x64")):
        assert (await draw(model=model, size=size)).status_code == 200
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    found = {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}
    ended = {key[1:]: value for key, value in found.items() if key[0] == "tetriserve_requests_total"}
    assert ended == {
        ("fast", "128x128", "finished"): 1, ("fine", "64x64", "finished"): 2, ("fine", "other", "finished"): 1
    }  # fmt: skip
    for name in (
        "requests_admitted_total", "requests_attained_total", "request_latency_seconds_count",
        "request_queued_seconds_count", "deadline_slack_seconds_count", "finish_error_seconds_bucket",
    ):  # fmt: skip
        labels = {key[1:] for key in found if key[0] == f"tetriserve_{name}"}
        assert {model for model in ("fast", "fine") if any(model in each for each in labels)} == {"fast", "fine"}, name
    steps = {key[1:]: value for key, value in found.items() if key[0] == "tetriserve_steps_total"}
    assert sum(value for (_, model), value in steps.items() if model == "fast") == 4
    assert sum(value for (_, model), value in steps.items() if model == "fine") == 6
    info = {key[1:] for key in found if key[0] == "tetriserve_model_info"}
    assert info == {("float32", "fa57", "fast"), ("float32", "f19e", "fine")}


async def test_the_log_line_names_the_model_where_there_are_several(draw, client, caplog):
    with caplog.at_level("INFO", "tetriserve.server"):
        await draw(model="sketch")
    (line,) = [record.getMessage() for record in caplog.records]
    assert " model=fine " in line


async def test_the_board_lists_the_models_and_its_rows_name_theirs(engine, executor):
    slot = EngineSlot(engine)
    hub = BoardHub(slot, RecentRuns(slot))
    await engine.generate(Generation(prompt="a lighthouse", size="64x64", model="fine"))
    messages = hub.watch()
    try:
        async with asyncio.timeout(HANG_S):
            snapshot = json.loads((await anext(messages)).decode().split("data: ")[1])
            fast = {"sizes": ["128x128", "64x64", "256x256"], "num_steps": 4}
            fine = {"sizes": ["256x256", "64x64", "128x128"], "num_steps": 2}
            assert snapshot["models"] == [
                {"key": "fast", "name": "fast", "makes": "image", **fast},
                {"key": "fine", "name": "fine", "makes": "image", **fine},
            ]
            assert [row["model"] for row in snapshot["ended"]] == ["fine"]
            drawing = asyncio.create_task(engine.generate(Generation(prompt="a lighthouse", size="64x64")))
            arrived: list[dict[str, object]] = []
            while not arrived:
                arrived = json.loads((await anext(messages)).decode().split("data: ")[1]).get("arrived", [])
            assert [row["model"] for row in arrived] == ["fast"]
            await drawing
    finally:
        await messages.aclose()


async def test_the_trace_names_the_models(client, draw):
    await draw(model="fine")
    events = (await client.get("/debug/trace")).json()["traceEvents"]
    assert [event["args"]["name"] for event in events if event["name"] == "process_name"] == ["fast, fine"]
    assert {event["args"]["model"] for event in events if event["ph"] == "X"} == {"fine"}


async def test_one_model_is_named_nowhere_that_it_was_not_before(connect, executor):
    engine = make_engine(executor)
    slot = EngineSlot(engine)
    hub = BoardHub(slot, RecentRuns(slot))
    async with connect(slot) as client:
        assert (await client.post(GENERATIONS, json=BODY)).status_code == 200
        assert "model" not in (await client.post("/v1/quotes", json=BODY)).json()
        events = (await client.get("/debug/trace")).json()["traceEvents"]
    assert all("model" not in event["args"] for event in events)
    messages = hub.watch()
    snapshot = json.loads((await anext(messages)).decode().split("data: ")[1])
    await messages.aclose()
    assert [(model["key"], model["name"]) for model in snapshot["models"]] == [("", "tiny/flux")]
    assert all("model" not in row for row in snapshot["ended"])
    await engine.stop()


async def test_the_same_work_has_one_key_whether_or_not_its_default_model_is_named(connect, tmp_path):
    executor = FakeExecutor()
    jobs = await make_journalled_jobs(executor, tmp_path / "j", cards=CARDS)
    async with connect(EngineSlot(jobs.engine, jobs)) as client:
        answers = []
        for model in (None, "fast", "quick"):
            body = {**BODY, "model": model, "seed": 1}
            answers.append((await client.post(GENERATIONS, json=body, headers={"Idempotency-Key": "a"})).json())
        assert answers[0]["data"] == answers[1]["data"] == answers[2]["data"]
        other = await client.post(
            GENERATIONS, json={**BODY, "model": "fine", "seed": 1}, headers={"Idempotency-Key": "a"}
        )
        assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    await jobs.stop()


async def left_unfinished(path: Path, cards, models: dict[Key, str | None]) -> None:
    """A life of a server whose journal has begun work under each key, for a model."""
    executor = FakeExecutor()
    jobs = await make_journalled_jobs(executor, path, cards=cards)
    executor.gate.clear()
    for key, model in models.items():
        jobs.call(key, [Generation(prompt="a lighthouse", size="64x64", seed=3, model=model)])
    await until(lambda: len(jobs.engine.state.trajectories) == len(models))
    await jobs.stop()


ONE, OTHER = Key("t", "one"), Key("t", "other")


async def test_a_restart_without_a_model_fails_its_work_alone(tmp_path, caplog):
    await left_unfinished(tmp_path / "j", CARDS, {ONE: "fast", OTHER: "fine"})
    executor = FakeExecutor()
    jobs = await make_journalled_jobs(
        executor, tmp_path / "j", cards=(FAST, dataclasses.replace(CARD, key="x", name="x"))
    )
    assert jobs.num_resumed == 1
    (image,) = await jobs.call(ONE, [Generation(prompt="a lighthouse", size="64x64", seed=3, model="fast")]).images()
    assert image.outcome.request.model == "fast"
    wanted = [Generation(prompt="a lighthouse", size="64x64", seed=3, model="fine")]
    with pytest.raises(RequestFailed, match="it was accepted for the model 'fine', with which this server was not"):
        await jobs.call(OTHER, wanted).images()
    assert (
        len([line for line in caplog.messages if "was not taken up: it was accepted for the model 'fine'" in line]) == 1
    )
    await jobs.stop()


async def test_work_goes_on_when_one_model_becomes_one_of_several_and_back(tmp_path):
    alone = dataclasses.replace(FINE, key="", name="tiny/flux", ranks=())
    wanted = [Generation(prompt="a lighthouse", size="64x64", seed=3)]
    await left_unfinished(tmp_path / "j", [alone], {ONE: None})
    jobs = await make_journalled_jobs(FakeExecutor(), tmp_path / "j", cards=CARDS)
    assert jobs.num_resumed == 1
    (image,) = await jobs.call(ONE, wanted).images()
    assert image.outcome.request.model == "fine"
    await jobs.stop()
    await left_unfinished(tmp_path / "k", CARDS, {ONE: "fine"})
    jobs = await make_journalled_jobs(FakeExecutor(), tmp_path / "k", cards=[alone])
    assert jobs.num_resumed == 1
    await jobs.stop()


async def test_the_journal_of_a_server_of_another_model_alone_is_refused(tmp_path):
    await left_unfinished(tmp_path / "j", [CARD], {ONE: None})
    message = (
        r"holds work of model 'tiny/flux' \(0123456789ab\), not of 'fast' \(fa57\) or 'fine' \(f19e\); serve that one"
    )
    with pytest.raises(ConfigError, match=message):
        Journal(tmp_path / "j", *(Model(card.name, card.fingerprint, card.key) for card in CARDS))


def test_components_are_told_with_the_keys_of_their_models():
    assert str(Component("vae", 2_500_000, "video")) == "video/vae 2.5 MB"
    assert str(Component("vae", 2_500_000)) == "vae 2.5 MB"
