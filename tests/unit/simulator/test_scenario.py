"""From what the user writes to something that runs: defaults, lists of policies, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tetriserve.core.errors import ConfigError
from tetriserve.core.request import Shape
from tetriserve.core.stages import DENOISE
from tetriserve.policies.registry import POLICIES
from tetriserve.profile import save_profile
from tetriserve.profile.bundled import bundled_profiles, open_profile
from tetriserve.simulator.scenario import Scenario, prepare


def test_the_pool_is_as_large_as_the_profiles_largest_degree_unless_said() -> None:
    assert prepare(Scenario()).num_ranks == 8
    assert prepare(Scenario(profile="qwen-image-4xh20", slo_multiple=1.5)).num_ranks == 4
    small = prepare(Scenario(num_ranks=2))
    request = next(small.requests(0))
    assert list(small.cost.times(request, request.stage_of(DENOISE))) == [1, 2]


def test_a_profile_is_bundled_or_a_file(tmp_path: Path) -> None:
    assert {"flux.1-dev-8xh100", "qwen-image-4xh20"} <= set(bundled_profiles())
    path = tmp_path / "mine.json"
    save_profile(open_profile("qwen-image-4xh20"), path)
    assert open_profile(str(path)).model == "Qwen-Image"


def test_bundled_profiles_say_where_their_figures_come_from() -> None:
    for name in bundled_profiles():
        assert len(open_profile(name).source) > 20


def test_all_is_every_policy_that_needs_no_argument_and_fixed_at_each_degree() -> None:
    setting = prepare(Scenario(num_ranks=4))
    names = setting.policies("all")
    assert {"tetriserve", "fcfs", "fixed:1", "fixed:2", "fixed:4"} <= set(names)
    useful = {name for name, spec in POLICIES.items() if not spec.is_for_study}
    assert {name.partition(":")[0] for name in names} == useful
    assert "fixed:8" not in names


def test_a_list_of_policies_may_have_settings() -> None:
    names = prepare(Scenario()).policies("tetriserve:placement=off,fill=off, fcfs,fixed:2,fcfs")
    assert names == ["tetriserve:placement=off,fill=off", "fcfs", "fixed:2"]


def test_workloads_follow_from_the_seed() -> None:
    setting = prepare(Scenario(mix="skewed", num_requests=20))
    assert list(setting.requests(1)) == list(prepare(Scenario(mix="skewed", num_requests=20)).requests(1))
    assert list(setting.requests(1)) != list(setting.requests(2))


def test_a_trace_replaces_the_workload(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,height,width\n1,512,512\n2,1024,1024\n")
    setting = prepare(Scenario(trace=path, num_steps=20, slo_scale=1.5))
    assert [request.deadline_s for request in setting.requests(7)] == [1 + 3.0, 2 + 4.5]
    assert setting.shapes == (Shape(512, 512), Shape(1024, 1024))
    assert not setting.varies_by_seed
    assert prepare(Scenario(trace=path, noise=0.1)).varies_by_seed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": "h200"}, "profile 'h200' is neither a file nor bundled; bundled: flux.1-dev-8xh100, qwen-"),
        ({"mix": "zipf"}, "unknown mix 'zipf'"),
        ({"rate_per_min": -1.0}, "rate is -1; allowed: 0.001 to 1e+06"),
        ({"arrivals": "tidal"}, "unknown arrivals 'tidal'"),
        ({"num_requests": 0}, "requests is 0; allowed: 1 to 1000000"),
        ({"num_steps": 0}, "steps is 0; allowed: 1 to 1000"),
        ({"num_ranks": 0}, "ranks is 0; allowed: 1 to 1024"),
        ({"noise": -0.1}, "noise is -0.1; allowed: 0 to 1"),
        ({"slo_scale": 0.0}, "slo-scale is 0; allowed: 0.001 to 1e+06"),
        ({"slo_multiple": -2.0}, "slo-multiple is -2; allowed: 0.001 to 1e+06"),
        ({"mix": "homogeneous:4096x4096"}, "profile flux.1-dev-8xh100 does not cover 4096x4096: "),
        ({"mix": "256x256:3,128x128:1"}, "profile flux.1-dev-8xh100 does not cover 128x128: a step of 128x128 at deg"),
    ],
)
def test_what_cannot_be_simulated_is_named(changes, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(Scenario(**changes))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_traces_shape_that_the_profile_lacks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,height,width,slo_ms\n1,4096,4096,9000\n")
    with pytest.raises(ConfigError, match="profile flux.1-dev-8xh100 does not cover 4096x4096: .*measured: 256x256, "):
        prepare(Scenario(trace=path))


def test_a_pool_smaller_than_every_degree_is_named(tmp_path: Path) -> None:
    profile = open_profile("flux.1-dev-8xh100")
    wide = dataclasses.replace(
        profile, rows=tuple(row for row in profile.rows if row.tokens is None or row.degree >= 4)
    )
    path = tmp_path / "wide.json"
    save_profile(wide, path)
    with pytest.raises(ConfigError, match="ranks is 2; profile .*wide.json starts at degree 4"):
        prepare(Scenario(profile=str(path), num_ranks=2))


@pytest.mark.parametrize("specs", ["best", "fixed", "fixed:3", "fcfs,", "fcfs,nobody", "fill=off"])
def test_a_policy_that_cannot_be_made_is_refused(specs: str) -> None:
    with pytest.raises(ConfigError, match="policy"):
        prepare(Scenario()).policies(specs)


def test_a_round_that_is_too_long_for_the_deadlines_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A 256x256 with 0.7 of 1.5 s takes 0.515 s alone; five steps of a 2048x2048 take 0.61 s."""
    named = "tetriserve:step_granularity=5,lookahead"
    prepare(Scenario(slo_scale=1.0)).policies(named)
    assert caplog.messages == []
    setting = prepare(Scenario(slo_scale=0.7))
    setting.policies(named)
    setting.policy("tetriserve:step_granularity=5")  # as for every seed
    (line,) = caplog.messages
    assert line.startswith("a round of policy tetriserve:step_granularity=5 takes 0.61 s")
    caplog.clear()
    setting.policies("tetriserve")
    assert caplog.messages == []
