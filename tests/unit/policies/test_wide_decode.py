"""Decodes that may run at several degrees: which one each policy takes, and that deadlines are met by it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tetriserve.core.plan import State
from tetriserve.core.stages import DECODE
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.stages import ahead_of, in_time, one_after_another, paces_of, within

DECODES = {1: 8.0, 2: 4.5, 4: 2.5, 8: 2.6}


@pytest.fixture
def cost(table_cost):
    """Ten steps of a second on one rank and half a second on two; no more degrees."""
    return table_cost({256: {1: 1.0, 2: 0.5}}, {256: DECODES}, encode=0.1)


@pytest.fixture
def decode_of(drive, make, request_of, cost):
    """The degree at which a lone request is decoded, and whether it is in time."""

    def run(spec: str, deadline_s: float, num_ranks: int = 8) -> tuple[int, bool]:
        request = request_of(256, num_steps=10, deadline_s=deadline_s)
        done = drive(make(spec, cost, num_ranks), [request], cost, num_ranks=num_ranks)
        (task,) = (task for _, _, task in done.tasks if task.stage == DECODE)
        return task.degree, done.finish_s["r"] <= deadline_s

    return run


@pytest.mark.parametrize(
    ("deadline_s", "degree"), [(100.0, 1), (13.5, 1), (12.5, 2), (9.8, 2), (7.8, 4)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("spec", ["lookahead", "tetriserve", "edf-best-fit"])
def test_policies_with_deadlines_decode_as_narrow_as_the_deadline_allows(spec, deadline_s, degree, decode_of):
    """Steps take 5 s on two ranks."""
    found, is_in_time = decode_of(spec, deadline_s)
    assert is_in_time
    assert found == degree


def test_lookahead_widens_what_costs_least(decode_of, make, cost, drive, request_of):
    """Steps at two ranks cost nothing more, so that a decode of 8 s is in time at 13.5 s."""
    assert decode_of("lookahead", 13.5) == (1, True)
    dear = type(cost)({256: {1: 1.0, 2: 0.9, 4: 0.5}}, {256: {1: 8.0, 2: 4.1}}, encode=0.1)
    request = request_of(256, num_steps=10, deadline_s=14.6)
    run = drive(make("lookahead:widen=off", dear), [request], dear)
    assert {task.degree for task in run.denoise("r")} == {1}
    assert [task.degree for _, _, task in run.tasks if task.stage == DECODE] == [2]


@pytest.mark.parametrize("spec", ["edf", "srtf", "sjf", "fcfs"])
def test_policies_for_latency_decode_at_the_fastest_degree(spec, decode_of):
    assert decode_of(spec, 100.0)[0] == 4
    assert decode_of(spec, 100.0, num_ranks=2)[0] == 2


@pytest.mark.parametrize(("spec", "degree"), [("fixed:1", 1), ("fixed:2", 2), ("rssp", 2)])
def test_policies_with_blocks_decode_on_theirs(spec, degree, decode_of):
    assert decode_of(spec, 100.0)[0] == degree


def test_a_late_request_is_decoded_at_its_cheapest_degree(make, request_of, cost):
    late = Trajectory.at(request_of(256, num_steps=10, deadline_s=-100.0), 2)
    for spec in ("lookahead", "tetriserve"):
        (task,) = make(spec, cost).plan(State((late,), (), tuple(range(8)), cost), 0.0).tasks
        assert (task.stage, task.degree) == (DECODE, 1)


@pytest.mark.parametrize("spec", ["lookahead", "tetriserve"])
def test_a_decode_is_as_wide_as_is_free_where_all_that_it_needs_is_not(spec, make, request_of, cost):
    """It would need four ranks, and two are idle: `lookahead` waits for nothing either, as no more will be in time."""
    at_decode = Trajectory.at(request_of(256, num_steps=10, deadline_s=4.6), 2)
    (task,) = make(spec, cost, 2).plan(State((at_decode,), (), (0, 1), cost), 0.0).tasks
    assert task.degree == 2


def test_paces_of_stages_one_after_the_other_are_those_within_the_same_ranks():
    first = paces_of(((1, 4.0), (2, 2.1), (4, 2.2)), 8, 0.0)
    second = paces_of(((1, 1.0), (4, 0.5)), 8, 0.0)
    assert [degree for degree, _, _ in first] == [1, 2]
    both = one_after_another([first, second])
    assert [(degree, pytest.approx(seconds)) for degree, seconds, _ in both] == [(1, 5.0), (2, 3.1), (4, 2.6)]
    assert within(both, 3)[0] == 2
    assert in_time(both, 5.0, 8)[0] == 1
    assert in_time(both, 4.9, 8)[0] == 2
    assert in_time(both, 1.0, 8)[0] == 4
    assert paces_of(((1, 4.0), (2, 2.1)), 1, 0.5) == ((1, 4.5, 4.5),)


def test_kinds_that_take_the_same_time_are_told_apart(cost, request_of):
    state = State(trajectories=(), in_flight=(), ranks=(0, 1), cost=cost)
    one = request_of(256, num_steps=3)
    again, other = replace(one, request_id="again"), replace(one, request_id="other", max_sequence_length=16)
    assert ahead_of(again, state) is ahead_of(one, state)
    assert ahead_of(other, state) == ahead_of(one, state)
    assert all(ours is not theirs for ours, theirs in zip(ahead_of(other, state), ahead_of(one, state), strict=True))
