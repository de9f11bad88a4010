"""What starts again before the policy is asked: tasks that were lost with their workers."""

from __future__ import annotations

from tetriserve.core.plan import State, Task
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.room import Room


def lost_tasks(state: State) -> list[Task]:
    """The tasks to do again now, in order of arrival, on idle ranks that may run them.

    Survivors of the loss are among them: a loss shall cost a request one task, and not its turn. Of a stage with steps
    this is one step, at the degree that was lost or the widest that idle ranks allow; what comes after it is the
    policy's again.
    """
    room = Room.of(state)
    wanted: list[tuple[Trajectory, int]] = []
    for trajectory in state.waiting:
        degree = _degree(trajectory, state, room) if trajectory.lost_degree else 0
        if degree and room.take(trajectory, degree):
            wanted.append((trajectory, degree))
    if not wanted:
        return []
    placed = room.place(wanted, team_s=state.cost.team_s)
    return [
        Task((trajectory.request_id,), trajectory.stage.kind, ranks, int(not trajectory.is_short))
        for (trajectory, _), ranks in zip(wanted, placed, strict=True)
    ]


def _degree(trajectory: Trajectory, state: State, room: Room) -> int:
    """0 if it fits on no ranks that are idle."""
    most = min(trajectory.lost_degree, room.free_for(trajectory))
    degrees = state.cost.times(trajectory.request, trajectory.stage)
    return max((degree for degree in degrees if degree <= most), default=0)
