"""The least GPU time that meets a budget: against enumeration, and by hand."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetriserve.policies.allocation import EPSILON_S, Segment, deadline_aware_allocation

tables = st.dictionaries(st.sampled_from([1, 2, 4, 8]), st.integers(1, 200).map(lambda ms: ms / 1000), min_size=1)


def gpu_s(segments, times):
    return sum(segment.num_steps * segment.degree * times[segment.degree] for segment in segments)


def duration_s(segments, times):
    return sum(segment.num_steps * times[segment.degree] for segment in segments)


def enumerate_mixes(num_steps, times):
    """Every split of the steps over every one or two degrees."""
    for degree in times:
        yield (Segment(num_steps, degree),)
    for first, second in combinations(times, 2):
        for count in range(1, num_steps):
            yield Segment(count, first), Segment(num_steps - count, second)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(times=tables, num_steps=st.integers(1, 12), budget_s=st.floats(0.0, 3.0))
def test_equals_enumeration_over_all_mixes_of_two_degrees(times, num_steps, budget_s):
    found = deadline_aware_allocation(num_steps, budget_s, times)
    feasible = [mix for mix in enumerate_mixes(num_steps, times) if duration_s(mix, times) <= budget_s + EPSILON_S]
    if not feasible:
        assert found is None
        return
    assert found is not None
    assert sum(segment.num_steps for segment in found) == num_steps
    assert duration_s(found, times) <= budget_s + 2 * EPSILON_S
    best_gpu_s = min(gpu_s(mix, times) for mix in feasible)
    assert gpu_s(found, times) == pytest.approx(best_gpu_s, abs=1e-12)
    ties = [mix for mix in feasible if gpu_s(mix, times) <= best_gpu_s + 1e-12]
    assert len(found) == min(len(mix) for mix in ties)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(times=tables, num_steps=st.integers(1, 60), budget_s=st.floats(0.0, 10.0))
def test_never_dearer_than_a_single_feasible_degree(times, num_steps, budget_s):
    found = deadline_aware_allocation(num_steps, budget_s, times)
    for degree, step_s in times.items():
        if num_steps * step_s <= budget_s:
            assert found is not None
            assert gpu_s(found, times) <= num_steps * degree * step_s + 1e-12


TIMES_2048 = {1: 0.760, 2: 0.4086, 4: 0.2184, 8: 0.1218}


@pytest.mark.parametrize(
    ("budget_s", "expected"),
    [
        (22.0, (Segment(28, 1),)),
        (12.0, (Segment(27, 2), Segment(1, 1))),
        (6.2, (Segment(28, 4),)),
        (5.0, (Segment(12, 8), Segment(16, 4))),
        (3.42, (Segment(28, 8),)),
        (3.40, None),
    ],
)
def test_2048_narrows_as_the_deadline_loosens(budget_s, expected):
    assert deadline_aware_allocation(28, budget_s, TIMES_2048) == expected


def test_a_small_shape_stays_at_degree_1_where_more_ranks_only_waste():
    times = {1: 0.018, 2: 0.018, 4: 0.019, 8: 0.020}
    assert deadline_aware_allocation(28, 0.51, times) == (Segment(28, 1),)
    assert deadline_aware_allocation(28, 0.50, times) is None


def test_equal_gpu_time_goes_to_one_degree_that_finishes_sooner():
    assert deadline_aware_allocation(10, 1.0, {1: 0.1, 2: 0.05}) == (Segment(10, 2),)


def test_a_budget_met_exactly_is_met():
    assert deadline_aware_allocation(3, 0.3, {1: 0.1}) == (Segment(3, 1),)
