"""Numbers of a comparison, checked by hand and against the outcomes themselves."""

from __future__ import annotations

import statistics

import pytest

from tetriserve.core.request import Shape
from tetriserve.simulator.comparison import compare, half_width
from tetriserve.simulator.run import simulate
from tetriserve.simulator.scenario import Scenario, prepare
from tetriserve.workload.outcome import Outcome
from tetriserve.workload.percentiles import percentile


def test_percentiles_interpolate() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert percentile(values, 0) == 1.0
    assert percentile(values, 50) == 3.0
    assert percentile(values, 99) == pytest.approx(4.96)
    assert percentile([7.0], 99) == 7.0


def test_the_half_width_is_students() -> None:
    assert half_width([0.5]) is None
    assert half_width([0.5, 0.5, 0.5]) == 0.0
    assert half_width([0.1, 0.2, 0.3, 0.4, 0.5]) == pytest.approx(2.776 * 0.15811388 / 5**0.5)
    assert half_width([0.0, 1.0] * 50) == pytest.approx(1.984 * 0.50251891 / 10, rel=1e-3)


def test_every_number_follows_from_the_outcomes() -> None:
    setting = prepare(Scenario(mix="256x256:1,1024x1024:1", rate_per_min=40, num_requests=40))
    seen: dict[tuple[str, int], list[Outcome]] = {}
    comparison = compare(
        setting,
        ["fcfs", "fixed:1"],
        [3, 4],
        on_outcome=lambda policy, seed, outcome: seen.setdefault((policy, seed), []).append(outcome),
    )
    assert list(seen) == [("fcfs", 3), ("fcfs", 4), ("fixed:1", 3), ("fixed:1", 4)]
    result = comparison.results[1]
    runs = [seen["fixed:1", seed] for seed in (3, 4)]
    assert result.policy == "fixed:1"
    sars = [sum(outcome.is_attained for outcome in run) / 40 for run in runs]
    assert result.sar == pytest.approx(statistics.fmean(sars))
    assert result.sar_half_width == pytest.approx(12.706 * statistics.stdev(sars) / 2**0.5)
    both = [outcome for run in runs for outcome in run]
    large = [outcome for outcome in both if outcome.request.shape.height == 1024]
    assert result.sar_by_shape[Shape(1024, 1024)] == sum(outcome.is_attained for outcome in large) / len(large)
    assert result.mean_latency_s == pytest.approx(statistics.fmean(outcome.latency_s for outcome in both))
    assert result.p50_latency_s == pytest.approx(statistics.median(outcome.latency_s for outcome in both))
    assert result.gpu_time_s == pytest.approx(sum(outcome.gpu_time_s for outcome in both) / 2)
    assert comparison.bound is not None
    assert all(result.sar <= comparison.bound + 1e-12 for result in comparison.results)


def test_gpu_time_is_what_tasks_take_with_their_start() -> None:
    setting = prepare(Scenario(mix="homogeneous:1024x1024", num_requests=1))
    result = compare(setting, ["fixed:1"], [0]).results[0]
    tasks = -(-28 // int(0.5 / 0.1536))  # denoise tasks of half a second
    assert result.gpu_time_s == pytest.approx(0.02 + 28 * 0.1536 + 0.06 + (tasks + 2) * 0.001)
    assert result.sar == 0.0  # the deadline is 3 s
    assert result.sar_half_width is None


def test_equal_arguments_give_equal_comparisons_with_noise_too() -> None:
    setting = prepare(Scenario(rate_per_min=30, num_requests=50, noise=0.1))
    first = compare(setting, ["tetriserve", "fixed:2"], [0, 1])
    assert first == compare(setting, ["tetriserve", "fixed:2"], [0, 1])
    assert first != compare(setting, ["tetriserve", "fixed:2"], [2, 3])


def test_with_noise_there_is_no_bound() -> None:
    assert compare(prepare(Scenario(num_requests=5, noise=0.1)), ["fcfs"], [0]).bound is None
    assert compare(prepare(Scenario(num_requests=5)), ["fcfs"], [0], has_bound=False).bound is None


def test_a_saved_run_replays_to_the_same_outcomes(tmp_path) -> None:
    from tetriserve.workload.traces import save_trace

    setting = prepare(Scenario(rate_per_min=30, num_requests=60, mix="skewed"))
    save_trace(setting.requests(5), tmp_path / "t.jsonl")
    replayed = prepare(Scenario(trace=tmp_path / "t.jsonl"))
    runs = [
        [
            (outcome.request.request_id, outcome.finish_s)
            for outcome in simulate(each.policy("fixed:2"), each.cost, each.requests(5), num_ranks=8)
        ]
        for each in (setting, replayed)
    ]
    assert runs[0] == runs[1]
