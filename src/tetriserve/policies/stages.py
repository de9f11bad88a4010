"""Short stages, which run outside of rounds and reservations, and how stages follow each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tetriserve.core.cluster import ANYWHERE, Role, StageRanks
from tetriserve.core.plan import CostModel, Task
from tetriserve.core.request import Request
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.room import Room


def urgency_order(trajectory: Trajectory) -> tuple[int, float, float, str]:
    """Sort key: priority class, then deadline; arrival and id make it total."""
    request = trajectory.request
    return request.priority, request.deadline_s, request.arrival_s, request.request_id


class Ahead(NamedTuple):
    """What lies ahead of a request at one of its stages, in seconds with the time to start each task.

    is_short, short_s: whether the present stage is short, and what it takes then, else 0.
    before_s: short stages up to the next one with steps, the present one included.
    has_steps: whether there is one with steps.
    is_followed, after_s: whether stages come after that one, and what they take.
    role, steps_role, after_role: of the present stage, of the one with steps and of what follows it: the ranks that
        may run it, None for every rank.
    """

    is_short: bool
    short_s: float
    before_s: float
    has_steps: bool
    is_followed: bool
    after_s: float
    role: Role | None = None
    steps_role: Role | None = None
    after_role: Role | None = None


def ahead_of(request: Request, cost: CostModel, stage_ranks: StageRanks = ANYWHERE) -> tuple[Ahead, ...]:
    """One entry for each of the request's stages; short stages count at their narrowest degrees."""
    roles = [stage_ranks.role(request.model, stage.kind) if stage_ranks else None for stage in request.stages]
    steps_at = request.stages.index(request.stepped)
    after_role = roles[steps_at + 1] if steps_at + 1 < len(roles) else None
    taken: list[float | None] = []  # None: it has steps
    for stage in request.stages:
        if stage.num_steps:
            taken.append(None)
        else:
            times = cost.times(request, stage)
            taken.append(cost.switch_s + times[min(times)])
    found = []
    for index, present in enumerate(taken):
        before_s = after_s = 0.0
        has_steps = is_followed = False
        for seconds in taken[index:]:
            if seconds is None:
                has_steps = True
            elif has_steps:
                is_followed, after_s = True, after_s + seconds
            else:
                before_s += seconds
        found.append(
            Ahead(
                present is not None,
                present or 0.0,
                before_s,
                has_steps,
                is_followed,
                after_s,
                roles[index],
                roles[steps_at],
                after_role,
            )  # fmt: skip
        )
    return tuple(found)


def place_short_stages(
    trajectories: Sequence[Trajectory], room: Room, *, team_s: float, preserve: bool = True
) -> list[Task]:
    """One task per trajectory, on the ranks of `room` that were taken for it.

    They start as soon as a rank is free, never at a round's start: a short request would spend most of its deadline
    waiting for two rounds to end. They run where the state is when that rank is free. One rank runs one task, so
    that decodes are one at a time per worker, which bounds peak memory (TetriServe, section 5).
    """
    placed = room.place([(trajectory, 1) for trajectory in trajectories], team_s=team_s, preserve=preserve)
    return [
        Task((trajectory.request_id,), trajectory.stage.kind, ranks)
        for trajectory, ranks in zip(trajectories, placed, strict=True)
    ]
