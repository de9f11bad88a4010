"""Another degree at every step: no way to serve, but the hardest schedule that a picture must survive unchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from tetriserve.core.plan import CostModel, Plan, State, Task
from tetriserve.core.trajectory import Trajectory

_Choice = TypeVar("_Choice")


class Unsteady:
    """`unsteady`: single steps at degrees and on ranks drawn by lot, requests in order of arrival.

    The lot is the request's seed and step: equal requests go through equal degrees. A request whose degree finds too
    few idle ranks waits for them, and everyone after it too.
    """

    def plan(self, state: State, now: float) -> Plan:
        idle = list(state.idle_ranks)
        tasks: list[Task] = []
        for trajectory in state.waiting:
            request, stage = trajectory.request, trajectory.stage
            if (state.stage_ranks or state.nodes.are_several) and not state.can_serve(trajectory):
                continue  # it waits for a rank to come back
            degree = _degree(trajectory, state.cost, state.num_ranks_for(request, stage))
            allowed = list(state.stage_ranks.among(request.model, stage.kind, idle)) if state.stage_ranks else idle
            if not 0 < degree <= len(allowed):
                break
            ranks = tuple(sorted(_take(allowed, trajectory, number) for number in range(degree)))
            idle = [rank for rank in idle if rank not in ranks]
            tasks.append(Task((trajectory.request_id,), stage.kind, ranks, int(not trajectory.is_short)))
        return Plan(tuple(tasks))


def _degree(trajectory: Trajectory, cost: CostModel, num_ranks: int) -> int:
    """0 if its shape runs at no degree that the pool has."""
    degrees = [degree for degree in cost.times(trajectory.request, trajectory.stage) if degree <= num_ranks]
    return _drawn(degrees, trajectory, "degree") if degrees else 0


def _take(idle: list[int], trajectory: Trajectory, number: int) -> int:
    rank = _drawn(idle, trajectory, f"rank {number}")
    idle.remove(rank)
    return rank


def _drawn(choices: Sequence[_Choice], trajectory: Trajectory, what: str) -> _Choice:
    digest = hashlib.sha256(f"{trajectory.request.seed} {trajectory.steps_done} {what}".encode()).digest()
    return choices[int.from_bytes(digest) % len(choices)]
