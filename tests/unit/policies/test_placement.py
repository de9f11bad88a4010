"""Which ranks a request gets."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.placement import FreeRanks, place

TEAM_S = 0.778
"""Any time above 0: then ranks are given in aligned blocks."""


def held_by(*holders: int) -> Trajectory:
    request = Request(
        request_id=str(holders),
        prompt="",
        shape=Shape(256, 256),
        stages=image_stages(4),
        seed=0,
        arrival_s=0.0,
        deadline_s=1.0,
    )
    return replace(Trajectory.at(request, 1, 0), holders=holders)


def those_that_fit(wanted: Iterable[tuple[Sequence[int], int]], idle: set[int]) -> list[tuple[Trajectory, int]]:
    fitting: list[tuple[Trajectory, int]] = []
    for holders, degree in wanted:
        if sum(other for _, other in fitting) + degree <= len(idle):
            fitting.append((held_by(*holders), degree))
    return fitting


def test_in_blocks_a_request_keeps_its_ranks_when_the_degree_stays():
    assert place([(held_by(), 2), (held_by(4, 5), 2)], range(8), team_s=TEAM_S) == [(6, 7), (4, 5)]
    assert place([(held_by(3, 6), 2)], range(8), team_s=TEAM_S) == [(3, 6)]


def test_in_blocks_narrowing_takes_an_aligned_part_of_its_ranks():
    assert place([(held_by(4, 5, 6, 7), 2)], range(8), team_s=TEAM_S) == [(4, 5)]
    assert place([(held_by(4, 5, 6, 7), 2)], [0, 1, 2, 3, 5, 6, 7], team_s=TEAM_S) == [(6, 7)]
    assert place([(held_by(4, 5, 6, 7), 2)], [0, 1, 5, 6], team_s=TEAM_S) == [(5, 6)]


def test_in_blocks_widening_takes_the_block_around_its_ranks():
    assert place([(held_by(6), 2)], range(8), team_s=TEAM_S) == [(6, 7)]
    assert place([(held_by(4, 5), 4)], range(8), team_s=TEAM_S) == [(4, 5, 6, 7)]


def test_busy_ranks_are_never_kept():
    assert place([(held_by(0, 1), 2)], [1, 4, 5], team_s=TEAM_S) == [(4, 5)]


def test_a_new_request_takes_the_block_that_splits_the_least_free_space():
    assert place([(held_by(), 1)], [0, 1, 2, 3, 5], team_s=TEAM_S) == [(5,)]
    assert place([(held_by(), 2)], [0, 1, 2, 3, 6, 7], team_s=TEAM_S) == [(6, 7)]


def test_scattered_ranks_serve_when_no_block_is_free():
    assert place([(held_by(), 2)], [1, 4, 6], team_s=TEAM_S) == [(1, 4)]
    assert place([(held_by(4), 2)], [1, 4, 6], team_s=TEAM_S) == [(1, 4)]


def test_a_wide_request_gets_the_block_that_displaces_fewest_others():
    assert place([(held_by(1), 1), (held_by(), 4)], range(8), team_s=TEAM_S) == [(1,), (4, 5, 6, 7)]


def test_one_set_has_one_order():
    assert place([(held_by(5, 4), 2)], range(8), team_s=TEAM_S) == [(4, 5)]


def test_without_preservation_holders_count_for_nothing():
    assert place([(held_by(6, 7), 2)], range(8), team_s=0.0, preserve=False) == [(0, 1)]
    assert place([(held_by(6, 7), 2)], range(8), team_s=TEAM_S, preserve=False) == [(0, 1)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    idle=st.sets(st.integers(0, 7)),
    wanted=st.lists(st.tuples(st.lists(st.integers(0, 7), unique=True), st.sampled_from([1, 2, 4, 8])), max_size=6),
    team_s=st.sampled_from([0.0, TEAM_S]),
    preserve=st.booleans(),
)
def test_sets_are_disjoint_idle_and_of_the_size_asked_for(idle, wanted, team_s, preserve):
    fitting = those_that_fit(wanted, idle)
    placed = place(fitting, idle, team_s=team_s, preserve=preserve)
    assert [len(ranks) for ranks in placed] == [degree for _, degree in fitting]
    used = [rank for ranks in placed for rank in ranks]
    assert len(set(used)) == len(used)
    assert set(used) <= idle
    assert all(list(ranks) == sorted(ranks) for ranks in placed)


def test_where_any_set_will_do_a_request_keeps_its_ranks_whether_they_are_a_block_or_not():
    assert place([(held_by(3, 6), 2)], range(8), team_s=0.0) == [(3, 6)]
    assert place([(held_by(4, 5, 6, 7), 2)], [0, 1, 5, 6], team_s=0.0) == [(5, 6)]  # narrows
    assert place([(held_by(4, 5, 6, 7), 2)], [0, 1, 4, 7], team_s=0.0) == [(4, 7)]
    assert place([(held_by(4, 5), 4)], [0, 1, 2, 3, 4, 5], team_s=0.0) == [(0, 1, 4, 5)]  # widens
    assert place([(held_by(1, 6), 2)], [1, 2, 3], team_s=0.0) == [(1, 2)]  # a rank is busy


def test_where_any_set_will_do_the_other_ranks_are_those_that_fewest_requests_hold_then_the_lowest():
    assert place([(held_by(), 2), (held_by(0, 1, 2), 1)], range(6), team_s=0.0) == [(3, 4), (0,)]
    assert place([(held_by(), 1), (held_by(0), 1)], range(2), team_s=0.0) == [(1,), (0,)]
    assert place([(held_by(0, 1), 1), (held_by(0, 2), 1), (held_by(), 1)], range(3), team_s=0.0) == [(1,), (2,), (0,)]


def test_where_any_set_will_do_a_request_whose_set_can_stay_goes_before_those_whose_sets_change():
    assert place([(held_by(0, 1), 4), (held_by(0, 1), 1), (held_by(0, 1), 2)], range(7), team_s=0.0) == [
        (2, 3, 4, 5), (6,), (0, 1),
    ]  # fmt: skip
    assert place([(held_by(0), 2), (held_by(0, 1), 1), (held_by(1), 1)], range(5), team_s=0.0) == [(2, 3), (0,), (1,)]


def most_kept(wanted: list[tuple[set[int], int]], idle: set[int]) -> int:
    """By trying all ways: how many ranks can get a request whose state they hold."""
    if not wanted:
        return 0
    (holders, degree), *rest = wanted
    held = idle & holders
    return max(
        number + most_kept(rest, idle - set(kept))
        for number in range(min(degree, len(held)) + 1)
        for kept in itertools.combinations(held, number)
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    idle=st.sets(st.integers(0, 5)),
    wanted=st.lists(st.tuples(st.lists(st.integers(0, 6), unique=True, max_size=4), st.integers(1, 3)), max_size=5),
)
def test_where_any_set_will_do_as_few_ranks_as_possible_have_to_fetch_a_state(idle, wanted):
    fitting = those_that_fit(wanted, idle)
    placed = place(fitting, idle, team_s=0.0)
    sets = [(set(trajectory.holders), degree) for trajectory, degree in fitting]
    kept = [len(holders.intersection(ranks)) for (holders, _), ranks in zip(sets, placed, strict=True)]
    assert sum(kept) == most_kept(sets, idle)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    idle=st.sets(st.integers(0, 15), min_size=4),
    wanted=st.lists(st.tuples(st.lists(st.integers(0, 15), unique=True, max_size=4), st.integers(1, 4)), max_size=8),
)
def test_where_any_set_will_do_a_request_gets_nothing_but_its_own_ranks_if_it_alone_holds_enough(idle, wanted):
    fitting = those_that_fit(wanted, idle)
    for (trajectory, degree), ranks in zip(fitting, place(fitting, idle, team_s=0.0), strict=True):
        others = {rank for other, _ in fitting if other is not trajectory for rank in other.holders}
        free_holders = idle.intersection(trajectory.holders)
        if len(free_holders - others) >= degree:
            assert free_holders.issuperset(ranks)
        if free_holders.isdisjoint(others):
            assert len(free_holders.intersection(ranks)) == min(degree, len(free_holders))


def best_block(free: set[int], degree: int) -> tuple[int, ...] | None:
    """By definition: the free aligned block with least free around it, in two, four and eight times its size."""
    starts = [start for start in range(0, 64, degree) if free.issuperset(range(start, start + degree))]

    def free_around(start: int) -> list[int]:
        return [sum(rank // size == start // size for rank in free) for size in (2 * degree, 4 * degree, 8 * degree)]

    best = min(starts, key=lambda start: (free_around(start), start), default=None)
    return None if best is None else tuple(range(best, best + degree))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(free=st.sets(st.integers(0, 63), min_size=20), degrees=st.lists(st.sampled_from([1, 2, 4, 8]), max_size=12))
def test_each_set_is_the_best_block_of_what_the_sets_before_it_left(free, degrees):
    available = FreeRanks(free)
    for degree in degrees:
        if degree >= len(free):
            break
        expected = best_block(free, degree)
        ranks = available.take(degree)
        assert expected is None or ranks == expected
        assert free.issuperset(ranks)
        free = free.difference(ranks)


def test_ranks_that_others_would_keep_go_last():
    available = FreeRanks(range(4))
    available.reserve((0, 1))
    available.reserve((1, 2))
    assert available.take(1) == (3,)
    available.give_up((0, 1))
    assert available.take(1) == (0,)
