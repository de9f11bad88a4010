"""Every run once, the same answers from any number of processes."""

from __future__ import annotations

import pytest

from tetriserve.core.errors import ConfigError
from tetriserve.simulator.comparison import compare
from tetriserve.simulator.scenario import Scenario, prepare
from tetriserve.simulator.study import Study

SCENARIOS = [Scenario(mix="skewed", rate_per_min=rate, num_requests=20) for rate in (12.0, 36.0)]


def test_it_says_what_compare_says() -> None:
    with Study([3, 4]) as study:
        answers = study.compare(SCENARIOS, ["fixed:2", "tetriserve"])
    assert answers == [compare(prepare(scenario), ["fixed:2", "tetriserve"], [3, 4]) for scenario in SCENARIOS]
    assert answers[0].bound is not None


def test_answers_do_not_depend_on_the_number_of_processes() -> None:
    with Study([0, 1]) as alone, Study([0, 1], num_processes=2) as together:
        assert alone.compare(SCENARIOS, ["fcfs"]) == together.compare(SCENARIOS, ["fcfs"])
        assert alone.outcomes(SCENARIOS[0], ["fcfs"]) == together.outcomes(SCENARIOS[0], ["fcfs"])


def test_what_is_known_is_not_run_again() -> None:
    seen: list[tuple[int, int]] = []
    with Study([0, 1], on_progress=lambda done, total: seen.append((done, total))) as study:
        first = study.compare(SCENARIOS[:1], ["fcfs"], has_bound=False)
        assert seen == [(1, 2), (2, 2)]
        assert study.compare(SCENARIOS[:1], ["fcfs"], has_bound=False) == first
        assert len(seen) == 2
        both = study.compare(SCENARIOS, ["fcfs", "fixed:2"], has_bound=False)
        assert seen[2:] == [(number, 6) for number in range(1, 7)]
        assert both[0].results[0] == first[0].results[0]


def test_outcomes_are_one_run_per_seed() -> None:
    with Study([0, 1]) as study:
        runs = study.outcomes(SCENARIOS[0], ["fcfs", "fixed:2"])
    assert list(runs) == ["fcfs", "fixed:2"]
    assert [len(run) for run in runs["fcfs"]] == [20, 20]
    assert runs["fcfs"][0][0].request.arrival_s != runs["fcfs"][1][0].request.arrival_s


def test_a_mistake_is_said_before_anything_runs() -> None:
    seen: list[int] = []
    with Study([0], on_progress=lambda done, total: seen.append(done)) as study:
        with pytest.raises(ConfigError, match="unknown policy 'guesswork'"):
            study.compare(SCENARIOS, ["fcfs", "guesswork"])
        with pytest.raises(ConfigError, match="unknown mix 'zipf'"):
            study.compare([*SCENARIOS, Scenario(mix="zipf")], ["fcfs"])
    assert seen == []


def test_with_noise_there_is_no_bound() -> None:
    with Study([0]) as study:
        (noisy,) = study.compare([Scenario(num_requests=5, noise=0.1)], ["fcfs"])
    assert noisy.bound is None
