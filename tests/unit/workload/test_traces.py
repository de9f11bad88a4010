"""Recorded requests: read, written, and refused with the line number."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tetriserve.core.errors import ConfigError
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.workload.arrivals import Poisson
from tetriserve.workload.mixes import uniform
from tetriserve.workload.outcome import Outcome, Status
from tetriserve.workload.slo import TableRule
from tetriserve.workload.synthesis import Portion, Synthesis
from tetriserve.workload.traces import Steps, load_trace, save_trace

LARGE = Shape(480, 832, 81)
REQUEST = Request(
    request_id="a", prompt="", shape=Shape(256, 512), stages=image_stages(5), seed=9, arrival_s=10.0, deadline_s=12.5
)


def load(path: Path) -> list[Request]:
    return load_trace(path, default_steps=28, deadlines=TableRule(2.0))


def test_csv_fields_are_read_and_the_missing_ones_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,height,width,num_steps,slo_ms,seed,priority\n3.5,512,1024,10,2500,7,1\n1,256,256,,,,\n")
    first, second = load(path)
    assert first == Request(
        request_id="r1",
        prompt="",
        shape=Shape(256, 256),
        stages=image_stages(28),
        seed=0,
        arrival_s=1.0,
        deadline_s=1.0 + 3.0,
    )
    assert second == Request(
        request_id="r0",
        prompt="",
        shape=Shape(512, 1024),
        stages=image_stages(10),
        seed=7,
        arrival_s=3.5,
        deadline_s=6.0,
        priority=1,
    )


def test_json_lines_are_read_and_empty_lines_skipped(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"arrival_s": 0, "height": 256, "width": 256, "slo_ms": 900, "request_id": "a"}\n\n')
    (request,) = load(path)
    assert (request.request_id, request.deadline_s) == ("a", 0.9)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_what_is_saved_is_loaded_again(tmp_path: Path, name: str) -> None:
    shapes = (Shape(256, 256), Shape(512, 1024))
    synthesis = Synthesis(
        arrivals=Poisson(rate_per_min=24),
        portions=(Portion(mix=uniform(shapes), num_steps=9),),
        deadlines=TableRule(),
        num_requests=40,
    )
    requests = list(synthesis.requests(random.Random(1)))
    save_trace(requests, tmp_path / name)
    loaded = load(tmp_path / name)
    assert [request.deadline_s for request in loaded] == pytest.approx([request.deadline_s for request in requests])
    for name in ("request_id", "shape", "num_steps", "seed", "arrival_s", "priority"):
        assert [getattr(request, name) for request in loaded] == [getattr(request, name) for request in requests]


def test_a_result_file_is_a_trace(tmp_path: Path) -> None:
    outcome = Outcome(request=REQUEST, status=Status.FINISHED, runs=(), predicted_finish_s=11.0, finish_s=11.5)
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(outcome.as_json()) + "\n")
    assert load(path) == [REQUEST]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "arrival_s,height,width\n1,256,256\n2,256\n", "line 3: the header has 3 columns, this line does not"),
        ("t.csv", "arrival_s,height,width\n1,256,256,9\n", "line 2: the header has 3 columns, this line does not"),
        ("t.csv", "arrival_s,height\n1,256\n", "line 2: width is missing"),
        (
            "t.csv",
            "arrival_s,height,width\nsoon,256,256\n",
            "line 2: arrival_s is 'soon'; it must be a number from 0 to 1e+08",
        ),
        (
            "t.csv",
            "arrival_s,height,width\n-1,256,256\n",
            "line 2: arrival_s is '-1'; it must be a number from 0 to 1e+08",
        ),
        ("t.csv", "arrival_s,height,width\nnan,256,256\n", "line 2: arrival_s is 'nan'"),
        ("t.csv", "arrival_s,height,width\n1,25.6,256\n", "line 2: height is '25.6'; it must be a whole number from 1"),
        ("t.csv", "arrival_s,height,width,slo\n1,256,256,9\n", "line 2: unknown field 'slo'; allowed: arrival_s, hei"),
        ("t.csv", "arrival_s,height,width\n", "has no requests"),
        ("t.csv", "", "has no requests"),
        ("t.csv", 'arrival_s,height,width\n1,"256,256\n', "line 2: unexpected end of data"),
        ("t.csv", "arrival_s,height,width\n1,64,64\n", "line 2: no deadline is known for 64x64"),
        ("t.jsonl", '{"arrival_s": 0, "height": 256, "width": 256}\nnonsense\n', "line 2: not JSON: "),
        ("t.jsonl", "[1]\n", "line 1: must be an object with arrival_s, height, width"),
        ("t.jsonl", '{"arrival_s": 0, "height": true, "width": 256}\n', "line 1: height is True; it must be a whole n"),
        ("t.jsonl", '{"arrival_s": 0, "height": 0, "width": 256}\n', "line 1: height is 0; it must be a whole number"),
        ("t.jsonl", '{"arrival_s": null, "height": 1, "width": 256}\n', "line 1: arrival_s is None; it must be a num"),
        ("t.jsonl", '{"arrival_s": 0, "height": 256, "width": 256, "num_steps": 0}\n', "line 1: num_steps is 0"),
        ("t.jsonl", '{"arrival_s": 0, "height": 256, "width": 256, "slo_ms": -5}\n', "line 1: slo_ms is -5"),
        ("t.jsonl", '{"arrival_s":0,"height":256,"width":256,"request_id":"a"}\n' * 2, "line 2: request_id 'a' is li"),
        ("t.txt", "", "the name must end in .csv, .jsonl or .ndjson"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"trace {path}") + "[,:]? " + re.escape(message)):
        load(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load(tmp_path / "b.csv")
    with pytest.raises(ConfigError, match=re.escape("must end in .csv, .jsonl or .ndjson")):
        save_trace([], tmp_path / "t.xml")


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_models_and_frames_are_saved_and_loaded_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("arrival_s,model,height,width,frames\n0,images,256,256,1\n1,videos,480,832,81\n")
    known = {"images": Steps(28), "videos": Steps(50, 2)}
    if name.endswith("jsonl"):
        path.write_text('{"arrival_s": 0, "model": "images", "height": 256, "width": 256}\n'
                        '{"arrival_s": 1, "model": "videos", "height": 480, "width": 832, "frames": 81}\n')  # fmt: skip
    requests = load_trace(path, default_steps=known, deadlines=TableRule(2.0, {Shape(256, 256): 1.5, LARGE: 90.0}))
    assert [(request.model, request.shape, request.num_steps) for request in requests] == [
        ("images", Shape(256, 256), 28),
        ("videos", LARGE, 50),
    ]
    save_trace(requests, path)
    assert load_trace(path, default_steps=known, deadlines=TableRule()) == requests


def test_a_result_file_says_the_model() -> None:
    request = replace(REQUEST, model="videos")
    outcome = Outcome(request=request, status=Status.FINISHED, runs=(), predicted_finish_s=11.0, finish_s=11.5)
    assert outcome.as_json()["model"] == "videos"
