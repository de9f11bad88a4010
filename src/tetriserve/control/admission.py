"""Is there room for a request, and when could it finish? Quick estimates, optimistic rather than pessimistic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tetriserve.core.cluster import Role
from tetriserve.core.cost import fastest_s, step_gpu_s
from tetriserve.core.errors import QueueFull
from tetriserve.core.plan import State
from tetriserve.core.request import Request
from tetriserve.core.trajectory import Trajectory


def earliest_finish(state: State, request: Request, now: float) -> float:
    """Finish time of `request` if the pool served, without a gap, first all that is due before it and then it.

    Work ahead is every unfinished request of an earlier priority class, and of the same class those with an earlier
    deadline that can still be met (late ones give way); each counts its least GPU time, shared by all ranks. The
    request's own time is its fastest. A schedule cannot be much better than this, but it can be worse: ranks fragment.
    """
    ahead_s = _pool_s(state, [other for other in state.trajectories if _goes_before(other, request, now)])
    alone_s = fastest_s(state.cost, request, state.num_ranks_for)
    return now + ahead_s + alone_s


def backlog_s(state: State) -> float:
    """Seconds the whole pool needs for what it has accepted: when to come back to a full queue."""
    return _pool_s(state, state.trajectories)


def check_room(state: State, num_more: int, max_queue: int) -> None:
    """
    Raises:
        QueueFull: more than `max_queue` requests would be waiting.
    """
    num_waiting = len(state.waiting)
    if num_waiting + num_more > max_queue:
        raise QueueFull(
            f"{num_waiting} requests are waiting, of at most {max_queue}; {num_more} more do not fit", backlog_s(state)
        )


def _goes_before(other: Trajectory, request: Request, now: float) -> bool:
    mine, its = request, other.request
    if its.priority != mine.priority:
        return its.priority < mine.priority
    return now <= its.deadline_s <= mine.deadline_s


def _pool_s(state: State, trajectories: Sequence[Trajectory]) -> float:
    """Seconds that the pool needs for what is left of `trajectories`, if no rank idles that may run some of it."""
    seconds = _least_gpu_time(state, trajectories) / max(len(state.ranks), 1)
    for allowed in state.stage_ranks.unions:
        gpu_s = _least_gpu_time(state, trajectories, allowed)
        seconds = max(seconds, gpu_s / max(len(allowed.intersection(state.ranks)), 1))
    return seconds


def _least_gpu_time(state: State, trajectories: Iterable[Trajectory], within: Role | None = None) -> float:
    """Rank-seconds left of `trajectories`, each at the degree that spends the fewest; of the stages alone that no rank
    outside of `within` may run."""
    cost = state.cost
    known: dict[tuple[object, ...], tuple[float, ...]] = {}  # per kind: of each stage, or of one step of it
    total_s = 0.0
    for trajectory in trajectories:
        request = trajectory.request
        kind = request.kind
        if kind not in known:
            known[kind] = tuple(
                step_gpu_s(cost, request, stage, state.num_ranks_for(request, stage))
                if within is None or _is_within(within, state.stage_ranks.role(request.model, stage.kind))
                else 0.0
                for stage in request.stages
            )
        index, done = trajectory.stage_index, trajectory.stage_steps_done
        for stage, gpu_s in zip(request.stages[index:], known[kind][index:], strict=True):
            total_s += max(1, stage.num_steps - done) * gpu_s
            done = 0
    return total_s


def _is_within(ranks: Role, role: Role | None) -> bool:
    return role is not None and role <= ranks
