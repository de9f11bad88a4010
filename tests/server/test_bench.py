"""`tetriserve bench` against TetriServe's own server: they agree on deadlines, models and schedules."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import CARD, FAILING
from typer.testing import CliRunner

from tetriserve.cli import app


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    program = Path(__file__).with_name("fake_engine.py")
    process = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    yield next(line.strip() for line in process.stdout if line.startswith("http"))
    process.terminate()
    process.wait()


def bench(url: str, *arguments: object) -> dict[str, object]:
    every = ["bench", "--base-url", url, "--format", "json", "--request-rate", "50", *map(str, arguments)]
    return json.loads(CliRunner().invoke(app, every).stdout)


def test_sizes_steps_and_model_are_the_servers_and_answers_tell_the_schedule(url: str) -> None:
    document = bench(url, "--num-prompts", 20, "--slo-table", "64x64:60,256x256:60", "--mix", "64x64,128x128,256x256")
    assert (document["model"], document["policy"]) == (CARD.name, "fcfs")
    assert document["slo_attainment_rate"] == 1.0
    assert set(document["by_size"]) == {"64x64", "128x128", "256x256"}
    for line in document["requests"]:
        assert line["num_steps"] == len(line["degrees"]) == CARD.default_num_steps
        assert line["arrival_s"] <= line["sent_s"] < line["predicted_finish_s"]
        assert line["gpu_time_s"] > 0
        assert 0 <= line["queued_s"] < line["latency_s"]


def test_the_server_plans_with_the_deadline_that_the_bench_sends(url: str) -> None:
    body = json.dumps({"deadline_policy": "reject"})
    document = bench(url, "--num-prompts", 3, "--width", 256, "--height", 256, "--slo-table", "256x256:0.01",
                     "--extra-body", body, "--warmup-requests", 0)  # fmt: skip
    assert document["errors"]["http_429"]["count"] == 3
    assert document["slo_attainment_rate"] == 0.0


def test_a_request_that_fails_is_counted_with_the_servers_words(url: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(FAILING)
    document = bench(url, "--num-prompts", 2, "--width", 64, "--height", 64, "--slo-table", "64x64:60",
                     "--prompts", prompts, "--warmup-requests", 0)  # fmt: skip
    assert document["errors"]["http_500"]["count"] == 2
    assert "latents are not finite" in document["errors"]["http_500"]["example"]
