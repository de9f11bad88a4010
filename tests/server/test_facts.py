"""What the server says of itself: models, metrics, the API's description, the log."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from pathlib import Path

from fake_engine import CARD, FAILING
from prometheus_client.parser import text_string_to_metric_families

from tests.waiting import until
from tetriserve.core.cluster import StageRanks
from tetriserve.core.memory import RankMemory
from tetriserve.core.stages import ENCODE
from tetriserve.engine.models import ServedModels
from tetriserve.server import EngineSlot


async def samples(client):
    """Every sample of `/metrics` by name and label values, but for the model's."""
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/plain")
    return {
        (sample.name, *(value for name, value in sample.labels.items() if name != "model")): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


async def test_models_lists_what_can_be_asked(client):
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (await client.get(f"/v1/models/{CARD.name}")).json() == model
    assert (model["id"], model["object"], model["owned_by"]) == ("tiny/flux", "model", "tetriserve")
    assert model["sizes"] == ["128x128", "64x64", "256x256"]
    assert model["size_range"] == {"smallest": "64x64", "largest": "256x256", "multiple": 16}
    assert model["degrees"] == {"128x128": [1, 2], "64x64": [1, 2], "256x256": [1, 2]}
    assert (model["default_num_inference_steps"], model["max_num_inference_steps"]) == (4, 200)
    assert model["default_guidance_scale"] == 3.5
    assert model["max_sequence_length"] == 64
    assert model["reproducibility"] == {"same_degrees": "identical", "max_levels": 1, "mean_levels": 0.01}
    assert model["has_negative_prompt"] is True
    assert model["execution"] == {
        "dtype": "float32", "attention": "default", "compile": "default", "quantization": "default",
        "tiling": "default", "offload": "default",
    }  # fmt: skip
    assert model["num_ranks"] == 2
    assert model["memory"] == [
        {
            "ranks": [0, 1], "stages": ["encode", "denoise", "encode_image", "decode"], "total": 3_501_000,
            "components": {"transformer": 3_000_000, "vae": 500_000, "text_encoder": 1000},
            "resident": [10_000_000, 10_000_001],
        }
    ]  # fmt: skip
    assert model["policy"]


async def test_models_say_by_role_what_ranks_hold_and_which_stages_they_run(client, engine, executor):
    engine.controller._tracker.stage_ranks = StageRanks.of({("", ENCODE): [0]})
    executor.memory[1] = RankMemory(executor.memory[1].components[:2], 7)
    (model,) = (await client.get("/v1/models")).json()["data"]
    assert [(held["ranks"], held["stages"], list(held["components"])) for held in model["memory"]] == [
        ([0], ["encode", "denoise", "encode_image", "decode"], ["transformer", "vae", "text_encoder"]),
        ([1], ["denoise", "encode_image", "decode"], ["transformer", "vae"]),
    ]


async def test_a_model_is_listed_and_served_under_each_of_its_names(client, engine, draw):
    card = dataclasses.replace(CARD, name="flux", aliases=("flux-dev", "b/c"), path=Path("/models/flux"))
    engine.models = ServedModels((dataclasses.replace(engine.intake, card=card),))
    assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["flux", "flux-dev", "b/c"]
    for name in ("flux", "flux-dev", "b/c", "default", "/models/flux"):
        response = await draw(model=name)
        assert (response.status_code, response.json().get("model")) == (200, "flux")
    for name in ("flux-dev", "b/c", "default"):
        assert (await client.get(f"/v1/models/{name}")).json()["id"] == "flux"
    assert (await draw(model="tiny/flux")).status_code == 404


async def test_another_model_is_a_404(client):
    response = await client.get("/v1/models/gpt-image-1")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


async def test_metrics_count_what_happened(client, draw):
    assert (await draw(n=2, slo_ms=60_000)).status_code == 200
    assert (await draw(size="128x128", num_inference_steps=6, slo_ms=1)).status_code == 200
    assert (await draw(prompt=FAILING)).status_code == 500
    assert (await draw(size="80x64", slo_ms=60_000)).status_code == 200
    assert (await draw(n=0)).status_code == 400
    await client.get("/no/such/path")
    await client.get("/v1/images/generations")

    found = await samples(client)
    assert found["tetriserve_requests_total", "64x64", "finished"] == 2
    assert found["tetriserve_requests_total", "128x128", "finished"] == 1
    assert found["tetriserve_requests_total", "64x64", "failed"] == 1
    assert found["tetriserve_requests_total", "other", "finished"] == 1
    assert found["tetriserve_requests_attained_total", "64x64"] == 2
    assert found["tetriserve_requests_missed_total", "64x64"] == 1
    assert found["tetriserve_requests_missed_total", "128x128"] == 1
    assert found["tetriserve_requests_attained_total", "128x128"] == 0
    assert found["tetriserve_request_latency_seconds_count", "64x64"] == 2
    assert found["tetriserve_request_queued_seconds_count", "64x64"] == 2
    assert found["tetriserve_deadline_slack_seconds_bucket", "0.0", "128x128"] == 1
    assert found["tetriserve_deadline_slack_seconds_bucket", "0.0", "64x64"] == 0
    assert found["tetriserve_deadline_slack_seconds_bucket", "+Inf", "64x64"] == 2
    assert found["tetriserve_steps_total", "2"] == 2 * 4 + 6 + 4
    assert found["tetriserve_rank_seconds_total", "denoise"] > found["tetriserve_rank_seconds_total", "encode"] > 0
    assert found["tetriserve_requests_waiting",] == found["tetriserve_requests_running",] == 0
    assert found["tetriserve_ranks_up",] == 2
    assert found["tetriserve_ranks_busy",] == 0
    assert found["tetriserve_http_requests_total", "POST", "/v1/images/generations", "200"] == 3
    assert found["tetriserve_http_requests_total", "POST", "/v1/images/generations", "400"] == 1
    assert found["tetriserve_http_requests_total", "POST", "/v1/images/generations", "500"] == 1
    assert found["tetriserve_http_requests_total", "GET", "unknown", "404"] == 1
    assert found["tetriserve_http_requests_total", "GET", "/v1/images/generations", "405"] == 1
    assert found["tetriserve_model_info", "float32", "0123456789ab"] == 1
    models = re.findall(r'tetriserve_\w+\{[^}]*model="([^"]*)"', (await client.get("/metrics")).text)
    assert set(models) == {"tiny/flux"}


async def test_metrics_show_what_waits_and_runs_now(client, draw, engine, executor):
    executor.gate.clear()
    pending = asyncio.gather(*(draw() for _ in range(3)))
    await until(lambda: len(engine.state.trajectories) == 3)
    found = await samples(client)
    assert (found["tetriserve_requests_running",], found["tetriserve_requests_waiting",]) == (1, 2)
    assert found["tetriserve_ranks_busy",] == 1
    executor.gate.set()
    await pending


async def test_every_metric_of_ours_is_named_by_the_rules(client, draw):
    await draw()
    families = list(text_string_to_metric_families((await client.get("/metrics")).text))
    assert families
    for family in families:
        assert family.name.startswith("tetriserve_")
        assert family.documentation


async def test_metrics_come_as_openmetrics_when_asked(client):
    response = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["Content-Type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


async def test_two_apps_count_apart(client, draw, connect):
    await draw()
    async with connect(EngineSlot()) as other:
        assert not any(key[0] == "tetriserve_requests_total" for key in await samples(other))


async def test_the_description_documents_errors_and_fields(client):
    description = (await client.get("/openapi.json")).json()
    operation = description["paths"]["/v1/images/generations"]["post"]
    assert {"200", "400", "401", "413", "429", "500", "503"} <= set(operation["responses"])
    assert operation["responses"]["422"]["description"].startswith("The idempotency key")
    assert "422" not in description["paths"]["/v1/quotes"]["post"]["responses"]
    fields = description["components"]["schemas"]["ImagesRequest"]["properties"]
    assert {"prompt", "slo_ms", "deadline_policy", "num_inference_steps"} <= set(fields)
    parameters = {parameter["name"] for parameter in operation["parameters"]}
    assert parameters == {"X-SLO-Ms", "X-Request-Id", "Idempotency-Key"}


async def test_one_line_of_log_per_request(draw, client, caplog):
    with caplog.at_level("INFO", "tetriserve.server"):
        await draw(n=2, size="64x64", slo_ms=60_000, request_id="r1")
        await draw(n=0, request_id="r2")
        await client.get("/health")
    first, second = [record.getMessage() for record in caplog.records]
    assert first.startswith("r1 POST /v1/images/generations 200 in ")
    assert re.search(r"size=64x64 n=2 image_ids=[0-9a-f]{32},[0-9a-f]{32} latency_s=0\.", first)
    assert first.endswith("attained=2/2")
    assert " 400 in " in second
    assert second.endswith("code=invalid_value param=n")


async def test_methods_that_clients_make_up_share_one_label(client):
    for method in ("BREW", "WHEN"):
        assert (await client.request(method, "/health")).status_code == 405
    counted = [line for line in (await client.get("/metrics")).text.splitlines() if 'status="405"' in line]
    assert [line for line in counted if "http_requests_total" in line and 'method="other"' in line][0].endswith(" 2.0")
    assert "BREW" not in "".join(counted)
