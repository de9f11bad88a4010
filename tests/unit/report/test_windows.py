"""Attainment and degree in a moving window, checked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from tetriserve.report.windows import degree_over_time, sar_over_time
from tetriserve.workload.outcome import Outcome


def value_at(points: list[tuple[float, float]], time_s: float) -> float:
    return min(points, key=lambda point: abs(point[0] - time_s))[1]


def test_sar_is_that_of_the_requests_that_arrive_around_a_moment(outcome_of: Callable[..., Outcome]) -> None:
    # A window spans 120 s / 12 = 10 s. In the first half everyone is in time, in the second every other.
    run = [
        outcome_of(f"r{second}", float(second), second + (99.0 if second >= 60 and second % 2 else 1.0))
        for second in range(121)
    ]
    points = sar_over_time([run])
    assert points[0][0] == pytest.approx(6.0)  # of 61 moments 2 s apart, the first with a whole window around it
    assert points[-1][0] == pytest.approx(114.0)
    assert value_at(points, 30) == 1.0
    assert value_at(points, 90) == 0.5
    assert value_at(points, 60) == pytest.approx(8 / 10, abs=0.06)


def test_runs_count_together(outcome_of: Callable[..., Outcome]) -> None:
    good = [outcome_of(f"r{second}", float(second), second + 1.0) for second in range(121)]
    bad = [outcome_of(f"r{second}", float(second), second + 99.0) for second in range(121)]
    assert value_at(sar_over_time([good, bad]), 60) == 0.5


def test_where_nobody_arrives_there_is_no_sar(outcome_of: Callable[..., Outcome]) -> None:
    points = sar_over_time([[outcome_of("a", 0.0, 1.0), outcome_of("b", 120.0, 121.0)]])
    assert math.isnan(value_at(points, 60))


def test_degrees_are_weighed_by_the_time_they_ran(outcome_of: Callable[..., Outcome]) -> None:
    first = outcome_of("a", 0.0, 60.0, (0.0, 60.0, (0, 1, 2, 3)), (60.0, 120.0, (0,)))
    second = outcome_of("b", 120.0, 130.0, (0.0, 60.0, (4,)))
    points = degree_over_time([[first, second]])
    assert value_at(points, 30) == pytest.approx(2.5)
    assert value_at(points, 90) == pytest.approx(1.0)


def test_where_nothing_runs_there_is_no_degree(outcome_of: Callable[..., Outcome]) -> None:
    points = degree_over_time([[outcome_of("a", 0.0, 9.0, (0.0, 9.0, (0,))), outcome_of("b", 120.0, 121.0)]])
    assert math.isnan(value_at(points, 60))


def test_requests_that_all_arrive_at_once_have_no_course(outcome_of: Callable[..., Outcome]) -> None:
    assert sar_over_time([[outcome_of("a", 0.0, 1.0), outcome_of("b", 0.0, 2.0)]]) == []
