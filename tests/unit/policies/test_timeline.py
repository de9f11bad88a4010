"""The step function of free ranks, and what is found in it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetriserve.policies.reservation import speeds_of, step_pieces
from tetriserve.policies.timeline import NEVER_S, Piece, Timeline

STEPS = ((1, 0.4), (2, 0.22), (4, 0.12))


@pytest.fixture
def timeline():
    """1 rank free from 10 s, 3 from 11 s, 4 from 12 s."""
    return Timeline.of(10.0, 1, [(12.0, 1), (11.0, 2)])


def test_released_ranks_add_up(timeline):
    assert (timeline.times, timeline.free) == ([10.0, 11.0, 12.0], [1, 3, 4])


def test_claims_are_taken_out_of_their_interval_alone(timeline):
    timeline.claim([Piece(11.5, 12.5, 3)])
    assert (timeline.times, timeline.free) == ([10.0, 11.0, 11.5, 12.0, 12.5], [1, 3, 0, 1, 4])


def test_free_until_is_the_first_shortage_per_degree(timeline):
    timeline.claim([Piece(10.5, 11.5, 1)])
    assert timeline.free_until(4) == [NEVER_S, 10.5, 10.0, 10.0, 10.0]


def test_the_earliest_gap_is_long_enough(timeline):
    timeline.claim([Piece(10.5, 11.0, 1), Piece(11.0, 11.25, 3)])
    assert timeline.earliest(0.5, 10.0) == 10.0
    assert timeline.earliest(0.6, 10.0) == 11.25


@given(
    pieces=st.lists(
        st.tuples(st.floats(0, 20), st.floats(0.01, 5), st.integers(1, 2)).map(
            lambda p: Piece(p[0], p[0] + p[1], p[2])
        ),
        max_size=8,
    ),
    at=st.floats(0.0, 30.0),
)
def test_free_is_the_pool_less_every_claim(pieces, at):
    timeline = Timeline.of(0.0, 16, [])
    timeline.claim(pieces)
    if min((abs(edge - at) for piece in pieces for edge in piece[:2]), default=1.0) > 1e-6:
        busy = sum(piece.degree for piece in pieces if piece.start_s < at < piece.end_s)
        assert timeline.free[timeline.index_at(at)] == 16 - busy


def test_steps_run_on_whatever_is_free_up_to_the_most_allowed(timeline):
    """One at 1 rank takes 0.4 s, so that two fit before 11 s; four at 2 before 12 s; the rest at 4 from then on."""
    speeds = speeds_of(STEPS, 4, 1e-12, 0.25)
    pieces = step_pieces(timeline, speeds, 10, 10.0, 20.0, 4)
    assert [(piece.degree, piece.num_steps) for piece in pieces] == [(1, 2), (2, 4), (4, 4)]
    assert pieces[-1].end_s == pytest.approx(12.48)
    narrower = step_pieces(timeline, speeds, 10, 10.0, 20.0, 2)
    assert [(piece.degree, piece.num_steps) for piece in narrower] == [(1, 2), (2, 8)]
    assert step_pieces(timeline, speeds, 10, 10.0, 12.4, 4) is None


def test_speeds_leave_out_degrees_that_only_cost_more():
    speeds = speeds_of(((1, 0.4), (2, 0.5), (4, 0.2)), 3, 0.001, 0.25)
    assert [degree for degree, _, _ in speeds.efficient] == [1]
    assert [degree for degree, _ in speeds.best] == [0, 1, 1]
    assert speeds_of(((4, 0.2),), 3, 0.001, 0.25) is None


def test_a_coarse_timeline_has_few_breakpoints_and_frees_every_rank():
    releases = [(0.0003 * number, 1) for number in range(1, 1001)]
    exact, coarse = Timeline.of(0.0, 24, releases), Timeline.of(0.0, 24, releases, resolution=0.03)
    assert len(exact.times) == 1001
    assert len(coarse.times) < 200
    assert exact.free[-1] == coarse.free[-1] == 1024
    for time_s in (0.001, 0.01, 0.1, 0.2):
        assert coarse.free[coarse.index_at(0.97 * time_s)] <= exact.free[exact.index_at(time_s)] + 1


@given(
    releases=st.lists(st.tuples(st.floats(0.001, 5.0), st.integers(1, 8)), max_size=30),
    wanted=st.lists(st.tuples(st.integers(1, 28), st.sampled_from([1, 2, 4]), st.floats(0.0, 3.0)), max_size=20),
)
def test_rounding_never_claims_a_rank_twice(releases, wanted):
    timeline = Timeline.of(0.0, 4, releases, resolution=0.05)
    speeds = speeds_of(STEPS, 4, 0.001, 0.25)
    for num_steps, max_degree, from_s in wanted:
        pieces = step_pieces(timeline, speeds, num_steps, from_s, 1e6, max_degree)
        timeline.claim(pieces or [])
        assert min(timeline.free) >= 0
