"""Plans kept inside nodes."""

from __future__ import annotations

from dataclasses import replace

from tetriserve.core.cluster import Nodes
from tetriserve.core.cost import move_s
from tetriserve.core.plan import InFlight, Plan, State, Task
from tetriserve.core.stages import DENOISE
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.nodes import within_nodes
from tetriserve.policies.placement import place_in_nodes

FOUR = Nodes(4)


def at_steps(request, holders=(), steps_done=0):
    return replace(Trajectory.at(request, 1, steps_done), holders=holders)


def planned(*tasks):
    return Plan(tuple(Task((name,), DENOISE, ranks, num_steps) for name, ranks, num_steps in tasks))


def flights(*busy):
    """One task on each rank of `busy`, pairs of a rank and an end."""
    return tuple(InFlight(rank, Task((f"busy{rank}",), DENOISE, (rank,), 1), 0.0, end_s) for rank, end_s in busy)


def state_of(trajectories, cost, in_flight=()):
    return State(tuple(trajectories), in_flight, tuple(range(8)), cost, nodes=FOUR)


def test_a_set_keeps_the_node_of_its_state_or_takes_the_node_that_it_fits_best(request_of):
    home = at_steps(request_of(1024, request_id="home"), holders=(4, 5))
    new = at_steps(request_of(1024, request_id="new"))
    assert place_in_nodes([(home, 2), (new, 1)], (0, 1, 2, 4, 5, 6, 7), FOUR, team_s=0.0) == [(4, 5), (6,)]
    assert place_in_nodes([(new, 3), (home, 4)], (0, 1, 2, 4, 5, 6, 7), FOUR, team_s=0.0) == [(0, 1, 2), (4, 5, 6, 7)]


def test_what_no_node_has_room_for_runs_narrower(request_of, flux):
    trajectory = at_steps(request_of(1024))
    state = state_of([trajectory], flux, flights((0, 1.0), (1, 1.0), (4, 1.0), (5, 1.0)))
    (task,) = within_nodes(planned(("r", (2, 3, 6, 7), 4)), state, 0.0).tasks
    assert task.ranks == (2, 3)
    assert task.num_steps == 2, "it lasts no longer than planned: 4 steps of 58 ms, 2 of 96 ms"


def test_one_that_would_then_be_late_waits_and_its_node_takes_no_other_task(request_of, flux):
    urgent = at_steps(request_of(1024, request_id="urgent", deadline_s=2.0), steps_done=0)
    other = at_steps(request_of(256, request_id="other"))
    busy = flights((0, 0.1), (1, 0.1), (4, 0.2), (5, 0.2))
    state = state_of([urgent, other], flux, busy)
    plan = within_nodes(planned(("urgent", (2, 3, 6, 7), 4), ("other", (0,), 1)), state, 0.0)
    assert not plan.tasks or {rank for task in plan.tasks for rank in task.ranks} <= {6, 7}
    assert "urgent" not in {name for task in plan.tasks for name in task.members}


def test_a_plan_inside_nodes_is_left_as_it_is(request_of, flux):
    state = state_of([at_steps(request_of(1024))], flux)
    plan = planned(("r", (4, 5), 4))
    assert within_nodes(plan, state, 0.0) is plan


def test_ranks_count_by_node(request_of, flux):
    request = request_of(2048)
    state = replace(state_of([], flux), ranks=(0, 1, 3, 4, 7))
    assert state.num_ranks_for(request, request.stepped) == 3


def test_a_move_to_another_node_costs_more(table_cost):
    cost = table_cost({}, {}, move_s=0.001, move_node_s=0.02)
    assert [move_s(cost, last, (0, 1), FOUR) for last in ((), (1, 0), (2, 3), (4, 5))] == [0.0, 0.0, 0.001, 0.02]
