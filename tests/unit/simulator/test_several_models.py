"""Several profiles in one simulated pool: each model's own times, steps, sizes and deadlines."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tetriserve.core.cost import narrowest_s
from tetriserve.core.errors import ConfigError
from tetriserve.core.request import Request, Shape
from tetriserve.policies.tetriserve import TetriServe
from tetriserve.profile import ProfileCost, save_profile
from tetriserve.profile.bundled import open_profile
from tetriserve.profile.by_model import CostByModel
from tetriserve.report.command import command_of
from tetriserve.report.printing import print_table
from tetriserve.report.single import render_comparison
from tetriserve.report.tables import comparison_json, comparison_table
from tetriserve.simulator.comparison import compare
from tetriserve.simulator.models import SimulatedModel
from tetriserve.simulator.planner import find_smallest_pool
from tetriserve.simulator.run import simulate
from tetriserve.simulator.scenario import Scenario, prepare
from tetriserve.simulator.study import Study
from tetriserve.simulator.writing import with_profiles
from tetriserve.workload.outcome import Outcome
from tetriserve.workload.slo import TableRule

FLUX, WAN = "flux.1-dev-8xh100", "wan2.2-ti2v-5b-8xh100"
IMAGES = SimulatedModel(key="images", profile=FLUX, slo_scale=1.5)
VIDEOS = SimulatedModel(key="videos", profile=WAN, slo_multiple=2.0)
POOL = Scenario(models=(IMAGES, VIDEOS), mix="images:20,videos:1", rate_per_min=20, num_requests=60)
DEFAULTS: dict[str, Any] = {"steps": None, "passes": None, "slo_scale": "1", "slo_multiple": None}


def requests_of(scenario: Scenario, seed: int = 0) -> list[Request]:
    return list(prepare(scenario).requests(seed))


def test_one_plain_profile_is_a_scenario_without_models() -> None:
    assert with_profiles(Scenario(mix="skewed"), [FLUX], **DEFAULTS) == Scenario(mix="skewed")
    assert isinstance(prepare(Scenario()).cost, ProfileCost)
    (request,) = {dataclasses.replace(r, request_id="", seed=0, arrival_s=0, deadline_s=0) for r in
                  requests_of(Scenario(mix="homogeneous:512x512", num_requests=3))}  # fmt: skip
    assert (request.model, request.num_steps, request.stepped.num_passes) == ("", 28, 1)


def test_one_named_model_asks_for_the_same_as_a_plain_profile() -> None:
    named = requests_of(Scenario(models=(SimulatedModel(key="images", profile=FLUX),), num_requests=30))
    assert [dataclasses.replace(request, model="") for request in named] == requests_of(Scenario(num_requests=30))


def test_each_model_has_its_own_steps_passes_sizes_and_deadlines() -> None:
    requests = requests_of(dataclasses.replace(POOL, num_requests=2000))
    counts = Counter(request.model for request in requests)
    assert counts["videos"] == pytest.approx(2000 / 21, abs=25)
    videos = [request for request in requests if request.model == "videos"]
    images = [request for request in requests if request.model == "images"]
    assert {request.shape for request in videos} == set(open_profile(WAN).shapes)
    assert {request.shape for request in images} == set(open_profile(FLUX).shapes)
    assert {(request.num_steps, request.stepped.num_passes) for request in videos} == {(50, 2)}
    assert {(request.num_steps, request.stepped.num_passes) for request in images} == {(28, 1)}
    wan = ProfileCost(open_profile(WAN))
    for request in videos:
        alone_s = narrowest_s(wan, request)
        assert request.deadline_s - request.arrival_s == pytest.approx(2 * alone_s)
    longest = next(request for request in videos if request.shape.frames == 121)
    assert narrowest_s(wan, longest) == pytest.approx(2 * 0.3 + 50 * 2 * 0.88 + 13.06)
    for request in images:
        assert request.deadline_s - request.arrival_s == pytest.approx(TableRule(1.5).slo_s(request))


def test_a_mix_may_name_the_sizes_of_each_model() -> None:
    requests = requests_of(dataclasses.replace(POOL, mix="images[512x512:1,1024x1024:3]:1,videos[832x480x81]:1"))
    assert {request.shape for request in requests if request.model == "videos"} == {Shape(480, 832, 81)}
    assert {request.shape.height for request in requests if request.model == "images"} == {512, 1024}


def test_times_are_each_models_own() -> None:
    setting = prepare(POOL)
    assert isinstance(setting.cost, CostByModel)
    by_model = {request.model: request for request in setting.requests(0)}
    for key, profile in (("images", FLUX), ("videos", WAN)):
        request = by_model[key]
        assert setting.cost.times(request, request.stepped) == ProfileCost(open_profile(profile)).times(
            request, request.stepped
        )


def test_a_request_can_wait_as_long_as_that_of_the_tightest_model() -> None:
    both = prepare(POOL).slack_s
    assert both == prepare(Scenario(slo_scale=1.5)).slack_s
    assert both < prepare(Scenario(profile=WAN, slo_multiple=2.0)).slack_s


def test_the_reference_of_a_round_is_the_longest_step_of_any_model() -> None:
    policy = prepare(POOL).policy("tetriserve:step_granularity=1")
    assert isinstance(policy, TetriServe)
    assert policy.clock.round_s == pytest.approx(2 * 0.2071 + 0.001)  # of 1280x704x121, two passes, at 8 ranks


def test_the_pool_is_as_large_as_the_largest_degree_of_any_profile() -> None:
    qwen = SimulatedModel(key="more", profile="qwen-image-4xh20", slo_multiple=3.0)
    assert prepare(Scenario(models=(qwen,), mix="more:1")).num_ranks == 4
    assert prepare(Scenario(models=(qwen, VIDEOS), mix="more:1")).num_ranks == 8


@pytest.mark.parametrize("policy", ["lookahead", "tetriserve", "edf-best-fit", "srtf", "fcfs", "fixed:4", "rssp"])
def test_every_policy_finishes_images_and_videos(policy: str) -> None:
    setting = prepare(POOL)
    outcomes = list(simulate(setting.policy(policy), setting.cost, setting.requests(0), num_ranks=setting.num_ranks))
    assert Counter(outcome.status.value for outcome in outcomes) == {"finished": 60}
    assert {outcome.request.model for outcome in outcomes} == {"images", "videos"}


def test_a_trace_names_the_model_of_each_request(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,model,height,width,frames,num_steps\n0,videos,704,1280,121,\n1,images,512,512,1,20\n")
    video, image = requests_of(dataclasses.replace(POOL, trace=path))
    assert (video.model, video.shape, video.num_steps) == ("videos", Shape(704, 1280, 121), 50)
    assert [stage.num_passes for stage in video.stages] == [2, 2, 1]
    assert (image.model, image.num_steps, image.deadline_s) == ("images", 20, 1 + 3.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0,,512,512", "line 2: model is missing; it must be one of images, videos"),
        ("0,sound,512,512", "line 2: model is 'sound'; it must be one of images, videos"),
        ("0,images,8192,8192", "line 2: no deadline is known for 8192x8192"),
    ],
)
def test_what_a_trace_may_not_say_of_a_model_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"arrival_s,model,height,width\n{line}\n")
    with pytest.raises(ConfigError, match=message):
        prepare(dataclasses.replace(POOL, trace=path))


def test_a_trace_of_models_needs_their_profiles(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,model,height,width\n0,images,512,512\n")
    with pytest.raises(ConfigError, match="line 2: model is 'images'; there is one model here, which no request names"):
        prepare(Scenario(trace=path))


def test_options_are_written_for_all_models_or_by_name() -> None:
    scenario = with_profiles(
        Scenario(mix="images:20,videos:1"),
        [f"images={FLUX}", f"videos={WAN}"],
        steps="videos=40",
        passes=None,
        slo_scale="images=1.5",
        slo_multiple="videos=2",
    )
    assert scenario == Scenario(models=(IMAGES, dataclasses.replace(VIDEOS, num_steps=40)), mix="images:20,videos:1")
    assert scenario.profile_name == f"images={FLUX}, videos={WAN}"
    for all_models in with_profiles(Scenario(), [f"a={FLUX}", f"b={WAN}"], **DEFAULTS | {"slo_multiple": "3"}).models:
        assert all_models.slo_multiple == 3.0


def test_the_command_of_a_scenario_of_models_gives_it_back() -> None:
    scenario = dataclasses.replace(POOL, models=(IMAGES, dataclasses.replace(VIDEOS, num_steps=40)))
    assert command_of(scenario, ["lookahead"], range(5)) == (
        f"tetriserve simulate --profile images={FLUX} --profile videos={WAN} --steps videos=40 --slo-scale images=1.5 "
        "--slo-multiple videos=2 --mix images:20,videos:1 --rate 20 --requests 60 --policies lookahead --seeds 5"
    )


@pytest.mark.parametrize(
    ("profiles", "changes", "message"),
    [
        ([FLUX, WAN], {}, f"profile is '{FLUX}' beside others; write NAME={FLUX}, with a name for each model"),
        ([f"a={FLUX}", f"a={WAN}"], {}, "there are two models named a; give each a name of its own"),
        ([f"a,b={FLUX}"], {}, "a model's name is letters, digits, '_', '.' and '-'"),
        ([f"a={FLUX}", f"b={WAN}"], {"steps": "c=3"}, "steps 'c=3': unknown model 'c'; models: a, b"),
        ([f"a={FLUX}", f"b={WAN}"], {"steps": "a=3,a=4"}, "steps 'a=3,a=4' names a twice"),
        ([f"a={FLUX}"], {"steps": "a=3.5"}, "steps is '3.5'; it must be a whole number, or NAME=NUMBER with commas"),
        ([FLUX], {"steps": "many"}, "steps is 'many'; it must be a whole number"),
        ([FLUX], {"slo_multiple": "a=2"}, "unknown model 'a'; models: one, which has no name: write the number alone"),
        ([FLUX], {"slo_scale": "x"}, "slo-scale is 'x'; it must be a number"),
    ],
)
def test_a_name_or_number_that_cannot_be_is_told(profiles: list[str], changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_profiles(Scenario(), profiles, **DEFAULTS | changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": "videos[4096x4096x9]:1"}, f"profile {WAN} does not cover 4096x4096x9: "),
        ({"models": (IMAGES, dataclasses.replace(VIDEOS, slo_multiple=None))},
         "model videos: no deadline is known for 832x480x81, only from 256x256 to 2048x2048; set --slo-multiple"),
        ({"models": (IMAGES, dataclasses.replace(VIDEOS, num_passes=9))}, "passes is 9; allowed: 1 to 8"),
        ({"models": (IMAGES, dataclasses.replace(VIDEOS, num_steps=0))}, "steps is 0; allowed: 1 to 1000"),
    ],
)  # fmt: skip
def test_what_cannot_be_simulated_names_its_model(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(dataclasses.replace(POOL, **changes))
    assert str(caught.value).startswith(message)


def test_attainment_is_told_of_each_model_and_none_exceeds_its_bound() -> None:
    setting = prepare(dataclasses.replace(POOL, rate_per_min=40))
    seen: list[Outcome] = []
    comparison = compare(
        setting, ["lookahead", "fcfs"], [0, 1], on_outcome=lambda policy, seed, outcome: seen.append(outcome)
    )
    assert comparison.models == ("images", "videos")
    assert comparison.bound is not None
    assert comparison.bound_by_model is not None
    for number, result in enumerate(comparison.results):
        of_policy = seen[number * 120 : (number + 1) * 120]
        for model, sar in result.sar_by_model.items():
            own = [outcome.is_attained for outcome in of_policy if outcome.request.model == model]
            assert sar == sum(own) / len(own)
            assert sar <= comparison.bound_by_model[model] + 1e-12
        assert result.sar <= comparison.bound + 1e-12
    fcfs = comparison.results[1].sar_by_model
    assert fcfs["images"] < 0.5 < fcfs["videos"]


def test_a_study_says_the_same_of_each_model() -> None:
    scenario = dataclasses.replace(POOL, num_requests=40)
    with Study([0, 1]) as study:
        (comparison,) = study.compare([scenario], ["fcfs"])
    assert comparison == compare(prepare(scenario), ["fcfs"], [0, 1])


def test_the_table_has_a_column_for_each_model_within_80_characters(capsys: pytest.CaptureFixture[str]) -> None:
    comparison = compare(prepare(dataclasses.replace(POOL, num_requests=40)), ["edf-best-fit"], [0, 1])
    table = comparison_table(comparison, "title")
    assert [str(column.header) for column in table.columns] == [
        "policy", "SAR", "images", "videos", "mean s", "p99 s", "GPU s",
    ]  # fmt: skip
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len([cell for cell in lines[-2].split("│")[3:5] if float(cell)]) == 2  # the bound of each model
    document = comparison_json(comparison)
    assert set(document["policies"][0]["sar_by_model"]) == {"images", "videos"}
    assert document["bound_by_model"] == comparison.bound_by_model


def test_one_model_has_no_columns_of_models() -> None:
    comparison = compare(prepare(Scenario(num_requests=10)), ["fcfs"], [0])
    assert comparison.models == ()
    assert comparison.bound_by_model is None
    assert comparison_json(comparison)["policies"][0]["sar_by_model"] == {}


def test_the_report_draws_the_attainment_of_each_model() -> None:
    setting = prepare(dataclasses.replace(POOL, num_requests=40))
    runs: dict[str, list[Outcome]] = {}
    comparison = compare(
        setting, ["fcfs"], [0], on_outcome=lambda policy, _, outcome: runs.setdefault(policy, []).append(outcome)
    )
    page = render_comparison(comparison, runs, num_ranks=8, title="both", command="tetriserve simulate")
    assert 'id="sar-by-model"' in page
    assert "SAR videos" in page


def test_the_smallest_pool_holds_the_deadlines_of_all_models(tmp_path: Path) -> None:
    """The video takes 58 s at degree 2, decode too, and at degree 4 it takes 44 s with a decode at degree 1."""
    path = tmp_path / "t.csv"
    path.write_text(
        "arrival_s,model,height,width,frames,slo_ms\n0,videos,704,1280,121,55000\n90,images,512,512,1,9000\n"
    )
    found = find_smallest_pool(dataclasses.replace(POOL, trace=path), target=1.0, policies="lookahead", max_ranks=8)
    assert found.answer is not None
    assert found.answer.num_ranks == 4
    assert {size.bound for size in found.sizes if not size.is_held} == {0.5}


def test_a_pool_is_at_least_as_large_as_every_models_smallest_degree(tmp_path: Path) -> None:
    profile = open_profile(WAN)
    wide = dataclasses.replace(profile, rows=tuple(row for row in profile.rows if row.tokens is None or row.degree > 2))
    save_profile(wide, tmp_path / "wide.json")
    videos = dataclasses.replace(VIDEOS, profile=str(tmp_path / "wide.json"))
    assert prepare(dataclasses.replace(POOL, models=(IMAGES, videos))).least_ranks == 4
    with pytest.raises(ConfigError, match="ranks is 2; profile .*wide.json starts at degree 4"):
        prepare(dataclasses.replace(POOL, models=(IMAGES, videos), num_ranks=2))
