"""Which lost tasks start again, and on how many ranks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from tetriserve.control.recovery import lost_tasks
from tetriserve.core.plan import CostModel, State, Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DENOISE, ENCODE, image_stages
from tetriserve.core.trajectory import Trajectory


def state(*trajectories: Trajectory, ranks: int, degrees: tuple[int, ...] = (1, 2, 4)) -> State:
    cost: Any = SimpleNamespace(
        times=lambda request, stage: dict.fromkeys(degrees, 0.1) if stage.kind == DENOISE else {1: 0.1}, team_s=0.0
    )
    return State(trajectories, (), tuple(range(ranks)), cast(CostModel, cost))


def lost(name: str, degree: int) -> Trajectory:
    request = Request(
        request_id=name, prompt="", shape=Shape(256, 256), stages=image_stages(8), seed=0, arrival_s=0.0, deadline_s=1.0
    )
    return replace(Trajectory.at(request, 1, 3), lost_degree=degree)


def test_each_gets_the_degree_that_it_lost_while_ranks_are_left() -> None:
    tasks = lost_tasks(state(lost("a", 2), lost("b", 1), lost("c", 1), ranks=3))
    assert [(task.members[0], task.degree, task.num_steps) for task in tasks] == [("a", 2, 1), ("b", 1, 1)]


def test_one_that_fits_nowhere_is_passed_over() -> None:
    narrow = replace(Trajectory(lost("b", 1).request), lost_degree=1)
    assert lost_tasks(state(lost("a", 4), narrow, ranks=1, degrees=(2, 4))) == [Task(("b",), ENCODE, (0,))]


def test_it_stays_where_its_state_is() -> None:
    (task,) = lost_tasks(state(replace(lost("a", 4), holders=(2,)), ranks=4, degrees=(1,)))
    assert task == Task(("a",), DENOISE, (2,), 1)


def test_others_are_the_policys() -> None:
    running = replace(lost("b", 1), is_running=True)
    assert lost_tasks(state(lost("a", 0), running, ranks=4)) == []
