"""Small traces that a scheduler once served badly, with what it has to attain; see tests/cases/README.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tetriserve.simulator.run import simulate
from tetriserve.simulator.scenario import Scenario, prepare
from tetriserve.workload.outcome import Outcome

CASES = Path(__file__).parents[2] / "cases"
VIDEO = str(CASES / "video-8.json")
FLUX = "flux.1-dev-8xh100"


def outcomes(name: str, policy: str, profile: str = FLUX, **settings: float) -> list[Outcome]:
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
        ("video-light-300", VIDEO, 432),  # 99.5 % of 434
        ("video-heavy-300", VIDEO, 633),  # 97.5 % of 649
    ],
)
def test_lookahead_attains(name: str, profile: str, least: int) -> None:
    assert num_attained(outcomes(name, "lookahead", profile)) >= least


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
