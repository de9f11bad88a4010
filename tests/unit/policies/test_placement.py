"""Which ranks a request gets."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.placement import FreeRanks, place


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


def test_keeps_its_ranks_when_the_degree_stays():
    assert place([(held_by(), 2), (held_by(4, 5), 2)], range(8)) == [(6, 7), (4, 5)]
    assert place([(held_by(3, 6), 2)], range(8)) == [(3, 6)]


def test_narrowing_takes_an_aligned_part_of_its_ranks():
    assert place([(held_by(4, 5, 6, 7), 2)], range(8)) == [(4, 5)]
    assert place([(held_by(4, 5, 6, 7), 2)], [0, 1, 2, 3, 5, 6, 7]) == [(6, 7)]
    assert place([(held_by(4, 5, 6, 7), 2)], [0, 1, 5, 6]) == [(5, 6)]


def test_widening_takes_the_block_around_its_ranks():
    assert place([(held_by(6), 2)], range(8)) == [(6, 7)]
    assert place([(held_by(4, 5), 4)], range(8)) == [(4, 5, 6, 7)]


def test_busy_ranks_are_never_kept():
    assert place([(held_by(0, 1), 2)], [1, 4, 5]) == [(4, 5)]


def test_a_new_request_takes_the_block_that_splits_the_least_free_space():
    assert place([(held_by(), 1)], [0, 1, 2, 3, 5]) == [(5,)]
    assert place([(held_by(), 2)], [0, 1, 2, 3, 6, 7]) == [(6, 7)]


def test_scattered_ranks_serve_when_no_block_is_free():
    assert place([(held_by(), 2)], [1, 4, 6]) == [(1, 4)]
    assert place([(held_by(4), 2)], [1, 4, 6]) == [(1, 4)]


def test_a_wide_request_gets_the_block_that_displaces_fewest_others():
    assert place([(held_by(1), 1), (held_by(), 4)], range(8)) == [(1,), (4, 5, 6, 7)]


def test_one_set_has_one_order():
    assert place([(held_by(5, 4), 2)], range(8)) == [(4, 5)]


def test_without_preservation_holders_count_for_nothing():
    assert place([(held_by(6, 7), 2)], range(8), preserve=False) == [(0, 1)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    idle=st.sets(st.integers(0, 7)),
    wanted=st.lists(st.tuples(st.lists(st.integers(0, 7), unique=True), st.sampled_from([1, 2, 4, 8])), max_size=6),
    preserve=st.booleans(),
)
def test_sets_are_disjoint_idle_and_of_the_size_asked_for(idle, wanted, preserve):
    fitting = []
    for holders, degree in wanted:
        if sum(other for _, other in fitting) + degree <= len(idle):
            fitting.append((held_by(*holders), degree))
    placed = place(fitting, idle, preserve=preserve)
    assert [len(ranks) for ranks in placed] == [degree for _, degree in fitting]
    used = [rank for ranks in placed for rank in ranks]
    assert len(set(used)) == len(used)
    assert set(used) <= idle
    assert all(list(ranks) == sorted(ranks) for ranks in placed)


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
