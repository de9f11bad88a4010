"""When could a request finish? An estimate for admission: quick, and optimistic rather than pessimistic."""

from __future__ import annotations

from tetriserve.core.plan import CostModel, State
from tetriserve.core.request import Request
from tetriserve.core.trajectory import Trajectory


def earliest_finish(state: State, request: Request, now: float) -> float:
    """Finish time of `request` if the pool served, without a gap, first all that is due before it and then it.

    Work ahead is every unfinished request of an earlier priority class, and of the same class those with an earlier
    deadline that can still be met (late ones give way); each counts its least GPU time, shared by all ranks. The
    request's own time is its fastest. A schedule cannot be much better than this, but it can be worse: ranks fragment.
    """
    ahead = sum(
        _least_gpu_time(state.cost, other, len(state.ranks))
        for other in state.trajectories
        if _goes_before(other, request, now)
    )
    times = state.cost.step_times(request)
    widest = max(len(state.ranks), min(times))
    alone_s = (
        state.cost.encode_s(request)
        + request.num_steps * min(step_s for degree, step_s in times.items() if degree <= widest)
        + state.cost.decode_s(request)
    )
    return now + ahead / max(len(state.ranks), 1) + alone_s


def backlog_s(state: State) -> float:
    """Seconds the whole pool needs for what it has accepted: when to come back to a full queue."""
    work = sum(_least_gpu_time(state.cost, trajectory, len(state.ranks)) for trajectory in state.trajectories)
    return work / max(len(state.ranks), 1)


def _goes_before(other: Trajectory, request: Request, now: float) -> bool:
    mine, its = request, other.request
    if its.priority != mine.priority:
        return its.priority < mine.priority
    return its.deadline_s <= mine.deadline_s and not other.is_late(now)


def _least_gpu_time(cost: CostModel, trajectory: Trajectory, num_ranks: int) -> float:
    """Rank-seconds left, at the degree that spends the fewest."""
    request = trajectory.request
    steps = [degree * step_s for degree, step_s in cost.step_times(request).items() if degree <= max(num_ranks, 1)]
    encode_s = 0.0 if trajectory.is_encoded else cost.encode_s(request)
    return encode_s + trajectory.remaining_steps * min(steps) + cost.decode_s(request)
