"""When a request could finish, with numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from tetriserve.control.admission import backlog_s, earliest_finish
from tetriserve.core.cluster import StageRanks
from tetriserve.core.execution import Execution
from tetriserve.core.plan import State
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, image_stages
from tetriserve.core.trajectory import Trajectory
from tetriserve.profile import Profile, ProfileCost, Row

COST = ProfileCost(
    Profile(
        model="m",
        hardware="h",
        execution=Execution("float32"),
        source="s",
        created="c",
        switch_s=0.001,
        rows=(
            Row(stage=ENCODE, seconds=0.5),
            *(
                Row(stage=DENOISE, height=256, width=256, tokens=64, degree=degree, seconds=step_s)
                for degree, step_s in ((1, 1.0), (2, 0.6), (4, 0.4))
            ),
            Row(stage=DECODE, height=256, width=256, seconds=2.0),
        ),
    )
)
REQUEST = Request(
    request_id="new",
    prompt="p",
    shape=Shape(256, 256),
    stages=image_stages(10),
    seed=0,
    arrival_s=100.0,
    deadline_s=120.0,
)
ALONE_S = 0.5 + 10 * 0.4 + 2.0
WORK_S = 0.5 + 10 * 1.0 + 2.0
"""Least rank-seconds of one whole request: degree 1 spends the fewest."""


def state(*trajectories: Trajectory, num_ranks: int = 4) -> State:
    return State(trajectories, (), tuple(range(num_ranks)), COST)


def other(**changes: object) -> Trajectory:
    return Trajectory(dataclasses.replace(REQUEST, request_id="other", **changes))  # type: ignore[arg-type]


def test_alone_it_takes_its_fastest_degree() -> None:
    assert earliest_finish(state(), REQUEST, 100.0) == pytest.approx(100.0 + ALONE_S)


@pytest.mark.parametrize(("num_ranks", "step_s"), [(1, 1.0), (2, 0.6), (3, 0.6), (4, 0.4), (9, 0.4)])
def test_only_degrees_that_fit_on_the_living_ranks_count(num_ranks: int, step_s: float) -> None:
    finish_s = earliest_finish(state(num_ranks=num_ranks), REQUEST, 0.0)
    assert finish_s == pytest.approx(0.5 + 10 * step_s + 2.0)


def test_without_any_rank_there_still_is_an_estimate() -> None:
    assert earliest_finish(state(other(), num_ranks=0), REQUEST, 0.0) == pytest.approx(WORK_S + WORK_S)


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"deadline_s": 119.0}, True),
        ({"deadline_s": 120.0}, True),
        ({"deadline_s": 121.0}, False),
        ({"deadline_s": 121.0, "priority": -1}, True),
        ({"deadline_s": 119.0, "priority": 1}, False),
        ({"deadline_s": 99.0}, False),  # late already: it gives way
        ({"deadline_s": 99.0, "priority": -1}, True),
    ],
)
def test_what_is_due_before_it_is_served_first_by_all_ranks(changes: dict[str, float], counts: bool) -> None:
    finish_s = earliest_finish(state(other(**changes)), REQUEST, 100.0)
    assert finish_s == pytest.approx(100.0 + ALONE_S + (WORK_S / 4 if counts else 0.0))


def test_work_already_done_is_not_counted_again() -> None:
    halfway = Trajectory.at(other(deadline_s=119.0).request, 1, 7)
    finish_s = earliest_finish(state(halfway), REQUEST, 100.0)
    assert finish_s == pytest.approx(100.0 + ALONE_S + (3 * 1.0 + 2.0) / 4)


def test_a_second_pass_of_each_step_is_work_too() -> None:
    guided = other(deadline_s=119.0, stages=image_stages(10, num_passes=2))
    finish_s = earliest_finish(state(guided), REQUEST, 100.0)
    assert finish_s == pytest.approx(100.0 + ALONE_S + (2 * 0.5 + 2 * 10 * 1.0 + 2.0) / 4)


def test_a_decode_counts_at_its_fastest_on_the_ranks_that_may_run_it() -> None:
    wide = tuple(Row(stage=DECODE, height=256, width=256, degree=k, seconds=s) for k, s in ((2, 1.2), (4, 0.7)))
    cost = ProfileCost(dataclasses.replace(COST.profile, rows=(*COST.profile.rows, *wide)))
    for limits, decode_s in (({}, 0.7), ({("", DECODE): [0, 1, 2]}, 1.2), ({("", DENOISE): range(4)}, 0.7)):
        limited = State((), (), tuple(range(4)), cost, stage_ranks=StageRanks.of(limits))
        assert earliest_finish(limited, REQUEST, 0.0) == pytest.approx(0.5 + 10 * 0.4 + decode_s)


def test_the_backlog_is_all_accepted_work_shared_by_all_ranks() -> None:
    halfway = Trajectory.at(other().request, 1, 7)
    assert backlog_s(state()) == 0.0
    assert backlog_s(state(other(), halfway, num_ranks=2)) == pytest.approx((WORK_S + 5.0) / 2)
    assert backlog_s(state(other(deadline_s=0.0), num_ranks=0)) == pytest.approx(WORK_S)
