"""From options to requests."""

from __future__ import annotations

import math
import random
from itertools import islice
from pathlib import Path

import pytest

from tetriserve.bench.load import Load, parse_request_config, parse_slo_table
from tetriserve.bench.target import Target
from tetriserve.core.errors import ConfigError
from tetriserve.core.request import Request, Shape
from tetriserve.simulator.scenario import Scenario, prepare
from tetriserve.workload.arrivals import Poisson

SMALL, LARGE = Shape(256, 256), Shape(1024, 1024)


def requests_of(load: Load, target: Target | None = None) -> list[Request]:
    return load.requests(target or Target(), load.deadlines({}))


def test_times_sizes_seeds_and_deadlines_are_those_of_a_simulation_with_the_same_options() -> None:
    loaded = requests_of(Load(mix="skewed", rate_per_min=24, num_requests=50, num_steps=28, slo_scale=1.2, seed=3))
    scenario = Scenario(mix="skewed", rate_per_min=24, num_requests=50, slo_scale=1.2)
    simulated = list(prepare(scenario).requests(3))
    keep = ("request_id", "shape", "num_steps", "seed", "arrival_s", "deadline_s")
    assert [[getattr(r, name) for name in keep] for r in loaded] == [
        [getattr(r, name) for name in keep] for r in simulated
    ]


def test_arrivals_are_poisson_by_default_and_a_rate_without_end_sends_all_at_once() -> None:
    gaps = list(islice(Poisson(rate_per_min=60).times(random.Random(0)), 5))
    assert [r.arrival_s for r in requests_of(Load(mix="homogeneous:256x256", rate_per_min=60, num_requests=1))] == gaps[
        :1
    ]
    assert {r.arrival_s for r in requests_of(Load(rate_per_min=math.inf, num_requests=9))} == {0.0}


def test_prompts_are_seeded_and_do_not_move_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  two\n")
    made_up, again, other = (requests_of(Load(num_requests=40, seed=seed)) for seed in (1, 1, 2))
    read = requests_of(Load(num_requests=40, seed=1, prompts=path))
    assert [r.prompt for r in made_up] == [r.prompt for r in again] != [r.prompt for r in other]
    assert len({r.prompt for r in made_up}) > 30
    assert {r.prompt for r in read} == {"one", "two"}
    assert [r.arrival_s for r in read] == [r.arrival_s for r in made_up]


def test_a_mix_without_sizes_takes_the_tables_then_the_servers_then_the_papers() -> None:
    served = Target(shapes=(SMALL, Shape(512, 512)))
    assert {r.shape for r in requests_of(Load(slo_table="256x256:1,1024x1024:3"), served)} == {SMALL, LARGE}
    assert {r.shape for r in requests_of(Load(), served)} == {SMALL, Shape(512, 512)}
    assert {r.shape.height for r in requests_of(Load())} == {256, 512, 1024, 2048}


def test_deadlines_come_from_the_table_or_from_what_the_warm_up_measured() -> None:
    table = Load(slo_table="256x256:1,1024x1024:3", slo_scale=1.5)
    assert {(r.shape, round(r.deadline_s - r.arrival_s, 6)) for r in requests_of(table)} == {(SMALL, 1.5), (LARGE, 4.5)}
    measured = Load(mix="homogeneous:64x64", slo_multiple=3.0, slo_scale=9.0)
    requests = measured.requests(Target(), measured.deadlines({Shape(64, 64): 0.5}))
    assert {round(r.deadline_s - r.arrival_s, 6) for r in requests} == {1.5}


def test_steps_are_the_operators_then_the_servers_then_left_to_it() -> None:
    assert {r.num_steps for r in requests_of(Load(num_steps=9), Target(num_steps=20))} == {9}
    assert {r.num_steps for r in requests_of(Load(), Target(num_steps=20))} == {20}
    assert {r.num_steps for r in requests_of(Load())} == {0}


def test_the_peers_request_config_is_a_mix_with_steps_of_its_own() -> None:
    text = (
        '[{"width": 512, "height": 256, "num_inference_steps": 20, "weight": 0.25},'
        ' {"width": 1024, "height": 1024, "weight": 0.75}]'
    )
    mix, steps = parse_request_config(text)
    assert dict(zip(mix.shapes, mix.weights, strict=True)) == {Shape(256, 512): 0.25, LARGE: 0.75}
    assert steps == {Shape(256, 512): 20}
    requests = requests_of(Load(request_config=text, num_requests=200, num_steps=28))
    assert {(r.shape, r.num_steps) for r in requests} == {(Shape(256, 512), 20), (LARGE, 28)}
    assert 0.15 < sum(r.num_steps == 20 for r in requests) / 200 < 0.35


def test_a_trace_keeps_its_times_deadlines_and_prompts(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,height,width,slo_ms,prompt\n0.5,256,256,900,a cat\n0.2,64,64,100,\n")
    first, second = requests_of(Load(trace=path, num_requests=7))
    assert (first.arrival_s, first.shape, first.num_steps) == (0.2, Shape(64, 64), 0)
    assert first.prompt.split()[0] in ("a", "an")
    assert (second.prompt, second.deadline_s) == ("a cat", pytest.approx(1.4))


def test_a_trace_of_videos_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,height,width,frames\n0,256,256,8\n")
    with pytest.raises(ConfigError, match="trace: r0 asks for 8 frames; the bench asks for 1"):
        requests_of(Load(trace=path))


def test_a_mix_of_videos_is_refused() -> None:
    with pytest.raises(ConfigError, match="mix 'homogeneous:832x480x81' asks for 81 frames; the bench asks for 1"):
        requests_of(Load(mix="homogeneous:832x480x81"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("256x256", "write seconds by size"),
        ("256x256:0", "write seconds"),
        ("1x1:1,1x1:2", "write seconds"),
        ("", "write"),
    ],
)
def test_a_table_that_cannot_be_is_one_line(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"slo-table is '{spec}'; {message}"):
        parse_slo_table(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be a JSON list of objects with width, height, num_inference_steps, weight: "),
        ("[]", "must be a JSON list of objects"),
        ('[{"width": 8}]', "height is None; it must be a whole number"),
        ('[{"width": 8, "height": 8, "frames": 2}]', "'frames' is none of them"),
        ('[{"width": 8, "height": 8}, {"width": 8, "height": 8}]', "names 8x8 twice"),
        ('[{"width": 8, "height": 8, "weight": "x"}]', "weight is 'x'; it must be a number"),
        ('[{"width": 8, "height": 8, "weight": 0}]', "the weight of 8x8 is 0; allowed: 1e-100 to 1e+100"),
    ],
)
def test_a_request_config_that_cannot_be_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_request_config(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
