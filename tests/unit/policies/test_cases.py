"""Small traces that a scheduler once served badly, with what it has to attain; see tests/cases/README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tetriserve.simulator.bound import max_attained
from tetriserve.simulator.run import simulate
from tetriserve.simulator.scenario import Scenario, prepare
from tetriserve.workload.outcome import Outcome, Status

CASES = Path(__file__).parents[2] / "cases"
VIDEO = str(CASES / "video-8.json")
FLUX = "flux.1-dev-8xh100"
QWEN = "qwen-image-4xh20"


def outcomes(name: str, policy: str, profile: str = FLUX, **settings: Any) -> list[Outcome]:
    setting = prepare(Scenario(trace=CASES / f"{name}.csv", profile=profile, **settings))
    return list(
        simulate(
            setting.policy(policy),
            setting.cost,
            setting.requests(0),
            num_ranks=setting.num_ranks,
            late_share=setting.late_share,
        )
    )


def num_attained(outcomes: list[Outcome]) -> int:
    return sum(outcome.is_attained for outcome in outcomes)


def longest_wait_s(outcomes: list[Outcome]) -> float:
    return max(outcome.finish_s - outcome.request.arrival_s for outcome in outcomes)


@pytest.mark.parametrize(
    ("name", "profile", "least"),
    [
        ("W1-batch-of-6", FLUX, 4),  # equal deadlines: one after the other
        ("batch-300", FLUX, 199),  # 82 % of 242
        ("H-5-wide-vs-eight", FLUX, 5),
        ("W2-video-and-images", VIDEO, 21),  # steps of seconds leave a rank to images that arrive
        ("video-light-300", VIDEO, 431),  # 99.3 % of 434; 432 without ranks held back from videos (docs/scheduling.md)
        ("video-heavy-300", VIDEO, 633),  # 97.5 % of 649
    ],
)
def test_lookahead_attains(name: str, profile: str, least: int) -> None:
    assert num_attained(outcomes(name, "lookahead", profile)) >= least


@pytest.mark.parametrize(
    ("name", "profile", "least"),
    [
        ("W4-qwen-tight", QWEN, 109),  # 93 with rounds of five steps, longer than a 512x512 can wait
        ("W5-two-2048-6.60", FLUX, 2),  # 1 with rounds of five steps, which hold 2.8 steps at degree 4
        ("video-light-300", VIDEO, 386),  # 89 % of 434; 77 % with rounds of 10 s
        ("video-heavy-300", VIDEO, 538),  # 83 % of 649; 67 %
    ],
)
def test_tetriserve_attains(name: str, profile: str, least: int) -> None:
    assert num_attained(outcomes(name, "tetriserve", profile)) >= least


def test_a_fixed_round_holds_no_whole_steps_at_the_degree_that_two_large_requests_need() -> None:
    assert num_attained(outcomes("W5-two-2048-6.60", "tetriserve:step_granularity=5")) == 1


OPTIMA = {
    "H-1-exact-deadline": (8, 0),  # in time but for moving the latents from the encoding rank to eight
    "H-1b-too-tight": (8, 0),
    "H-2-two-2048-6.40": (8, 2),
    "H-2b-two-2048-6.30": (8, 1),
    "H-3-one-rank-three-256": (1, 3),
    "H-3b-slack-5ms": (1, 3),
    "H-4-moore-hodgson": (1, 3),  # all but the 1024x1024, which has the earliest deadline
    "H-5-wide-vs-eight": (8, 5),
}
"""Ranks, and the most in time, found by hand."""


@pytest.mark.parametrize("name", OPTIMA)
def test_the_upper_bound_is_not_below_an_optimum_found_by_hand(name: str) -> None:
    num_ranks, most = OPTIMA[name]
    setting = prepare(Scenario(trace=CASES / f"{name}.csv", num_ranks=num_ranks))
    assert max_attained(list(setting.requests(0)), setting.cost, num_ranks) >= most


@pytest.mark.parametrize(
    "name", ["H-1-exact-deadline", "H-1b-too-tight", "H-2b-two-2048-6.30", "H-3b-slack-5ms", "H-4-moore-hodgson"]
)
def test_lookahead_attains_an_optimum_found_by_hand(name: str) -> None:
    num_ranks, most = OPTIMA[name]
    assert num_attained(outcomes(name, "lookahead", num_ranks=num_ranks)) == most


@pytest.mark.parametrize("profile", ["odd-6", "two-2"])
def test_every_policy_runs_on_pools_of_other_sizes(profile: str) -> None:
    """Six ranks with degrees 1, 2, 3 and 6; two ranks."""
    setting = prepare(Scenario(profile=str(CASES / f"{profile}.json"), rate_per_min=60, num_requests=12))
    requests = list(setting.requests(0))
    for policy in (*setting.policies("all"), "tetriserve:step_granularity=5", "unsteady", "exhaustive:nodes=20"):
        ended = list(simulate(setting.policy(policy), setting.cost, iter(requests), num_ranks=setting.num_ranks))
        assert {outcome.request.request_id for outcome in ended} == {request.request_id for request in requests}
        assert {outcome.status for outcome in ended} == {Status.FINISHED}, policy


def test_a_late_request_beside_a_stream_that_fills_the_pool_ends_within_a_minute() -> None:
    def waits_s(policy: str, late_share: float) -> float:
        (late,) = [o for o in outcomes("W3-starve", policy, late_share=late_share) if o.request.request_id == "r0"]
        return late.finish_s - late.request.arrival_s

    assert waits_s("lookahead", 0.05) <= 60
    assert waits_s("lookahead", 0.0) > 60


def test_under_overload_that_lasts_the_longest_wait_is_bounded() -> None:
    ended = outcomes("overload-skewed60-300", "lookahead")
    assert longest_wait_s(ended) <= 300  # 377 s when late requests ran least GPU time first, in what others left
    assert num_attained(ended) >= 256  # of the 261 then


@pytest.mark.parametrize(("name", "most"), [("H-2-two-2048-6.40", 2), ("H-2b-two-2048-6.30", 1)])
def test_exhaustive_finds_the_optimum_of_two_large_requests_and_says_that_it_stopped_early(
    name: str, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Side by side on four ranks each, 28 steps end after 6.39 s."""
    assert num_attained(outcomes(name, "exhaustive:nodes=2000")) == most
    (warning,) = caplog.messages
    assert warning.startswith("exhaustive stopped a search after 2000 partial schedules")
