"""Idle ranks counted by kind of stage: what is taken can be placed, and no more can be taken than could be."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetriserve.core.cluster import StageRanks
from tetriserve.core.plan import Plan, State, Task
from tetriserve.core.request import Stage
from tetriserve.core.stages import DENOISE, ENCODE
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.placement import place
from tetriserve.policies.room import Room, within_limits

STAGES = [(model, kind) for model in ("", "m", "n") for kind in ("a", "b")]
some_ranks = st.lists(st.integers(0, 4), min_size=1, unique=True)
quick = settings(max_examples=300, deadline=None, derandomize=True)


limits = st.dictionaries(
    st.tuples(st.sampled_from(["", "m", "n"]), st.sampled_from(["", "a"])), some_ranks, max_size=4
).map(StageRanks.of)
"""Of all models or one, of all kinds or one; what they have in common may be no rank."""


@pytest.fixture(scope="module")
def stands_at(request_of):
    """A trajectory whose present stage is of a model and kind."""

    def build(stage: tuple[str, str], holders: tuple[int, ...] = (), name: str = "r") -> Trajectory:
        model, kind = stage
        request = replace(request_of(256, request_id=name), model=model, stages=(Stage(kind),))
        return replace(Trajectory(request), holders=holders)

    return build


def can_be_seated(stages: list[tuple[str, str]], idle: list[int], limits: StageRanks) -> bool:
    return any(
        all(limits.allows(*stage, (rank,)) for stage, rank in zip(stages, ranks, strict=True))
        for ranks in permutations(idle, len(stages))
    )


def test_a_stage_has_the_ranks_that_the_limits_of_its_model_and_of_its_kind_have_in_common():
    by_model = StageRanks.of({("video", ""): range(4, 8), ("image", ""): range(8)})
    both = by_model & StageRanks.of({("", ENCODE): [0, 4, 5]}) & StageRanks.of({("", ENCODE): [0, 5]})
    assert both.among("video", ENCODE, range(8)) == (5,)
    assert both.among("image", ENCODE, range(8)) == (0, 5)
    assert both.among("video", DENOISE, range(8)) == (4, 5, 6, 7)
    assert both.among("other", DENOISE, range(8)) == tuple(range(8))
    assert both.allows("image", DENOISE, range(8))
    assert not both.allows("video", DENOISE, (3, 4))
    assert both.kinds == {ENCODE}


def test_models_with_ranks_and_encoders_of_their_own_are_counted_by_few_sets():
    """Ten models with stages of two roles each: 20 sets, not the million subsets of them."""
    limits = {
        (f"m{n}", kind): range(4 * n, 4 * n + 4 - 3 * (kind == ENCODE)) for n in range(10) for kind in ("", ENCODE)
    }
    assert len(StageRanks.of(limits).unions) == 20


def test_as_many_are_taken_as_any_assignment_of_ranks_could_seat(stands_at):
    @quick
    @given(limits, some_ranks, st.lists(st.sampled_from(STAGES), max_size=6))
    def check(stage_ranks, idle, stages):
        room, taken = Room(idle, stage_ranks), []
        for stage in stages:
            fits = can_be_seated([*taken, stage], idle, stage_ranks)
            assert (room.free_for(stands_at(stage)) > 0) == fits
            assert room.take(stands_at(stage)) == fits
            taken += [stage] * fits

    check()


def test_what_is_taken_is_placed_in_any_order_on_ranks_that_may_run_it(stands_at):
    @quick
    @given(data=st.data())
    def check(data):
        stage_ranks, idle = data.draw(limits), data.draw(some_ranks)
        room, wanted = Room(idle, stage_ranks), []
        for stage in data.draw(st.lists(st.sampled_from(STAGES), max_size=6)):
            degree = data.draw(st.integers(1, 3))
            holders = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3, unique=True)))
            if room.take(stands_at(stage), degree):
                wanted.append((stands_at(stage, holders), degree))
        team_s, used = data.draw(st.sampled_from([0.0, 0.7])), []
        cut = data.draw(st.integers(0, len(wanted)))
        for part in (wanted[cut:], wanted[:cut]):
            for (trajectory, degree), ranks in zip(part, room.place(part, team_s=team_s), strict=True):
                assert len(ranks) == degree
                assert stage_ranks.allows(trajectory.request.model, trajectory.stage.kind, ranks)
                used += ranks
        assert len(used) == len(set(used)) and set(used) <= set(idle)
        assert room.num_free == len(idle) - len(used)

    check()


def test_ranks_that_others_depend_on_are_used_last(stands_at):
    """Also by a request whose state one holds, unless a new set of ranks costs time and it would keep its set."""
    at_0, on_both = stands_at(("", "a"), (0,)), stands_at(("", "a"), (0, 1))
    for team_s in (0.0, 0.7):
        assert place([(at_0, 1)], range(4), team_s=team_s, spared={0}) != [(0,)]
        assert place([(at_0, 2)], range(4), team_s=team_s, spared={0}) == [(2, 3) if team_s else (1, 2)]
        assert place([(at_0, 4)], range(4), team_s=team_s, spared={0}) == [(0, 1, 2, 3)]
    assert place([(on_both, 2)], range(4), team_s=0.7, spared={0}) == [(0, 1)]
    assert place([(on_both, 2)], range(4), team_s=0.0, spared={0}) == [(1, 2)]


def test_a_plan_that_knows_of_no_limits_is_moved_and_what_does_not_fit_waits(request_of, flux):
    new = [Trajectory(request_of(256, request_id=name)) for name in "ab"]
    steps = replace(Trajectory.at(request_of(256, request_id="c"), 1, 0), holders=(0,))
    state = State((*new, steps), (), (0, 1, 2, 3), flux, stage_ranks=StageRanks.of({("", ENCODE): [0]}))
    plan = Plan((Task(("c",), DENOISE, (0, 1), 3), Task(("a",), ENCODE, (2,)), Task(("b",), ENCODE, (3,))), wake_at=5.0)
    moved = within_limits(plan, state)
    assert [(task.members, task.stage, task.num_steps) for task in moved.tasks] == [
        (("a",), ENCODE, 0),
        (("c",), DENOISE, 3),
    ]
    assert moved.tasks[0].ranks == (0,)
    assert set(moved.tasks[1].ranks) < {1, 2, 3}
    assert moved.wake_at == 5.0
    kept = Plan((Task(("a",), ENCODE, (0,)), Task(("c",), DENOISE, (2, 3), 3)))
    assert within_limits(kept, state) is kept
    assert within_limits(plan, replace(state, stage_ranks=StageRanks())) is plan
