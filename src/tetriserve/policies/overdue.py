"""Late requests: what is owed to them, and when the others can spare it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tetriserve.core.plan import State
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.degrees import least_gpu_s

OVERDUE_S = 3.0
"""A request is overdue this long after its deadline: before, it likely ends in what the others leave."""

INSTALMENT_S = 30.0
"""Rank-seconds of credit that are saved up at most, and then spent on one request at a time."""

_COVER = 0.8
"""The part of what a request still needs that its credit must cover: the rest accrues while it runs."""

IN_HAND_S = 5.0
"""Slack that is kept for arrivals, at least; three times the time alone where that is more."""


def owed(state: State, now: float) -> Trajectory | None:
    """The waiting request that may start before all others now: the one longest overdue, once it can run to its end.

    One that the living ranks cannot serve, for its degrees or its present stage, is passed over, or it would keep the
    share from all others.

    What is owed is served in one go, because a task now and then delays all others each time. One that needs more than
    `INSTALMENT_S` is served in parts.
    """
    if state.late_credit_s <= 0:
        return None
    if state.stage_ranks or state.nodes.are_several:
        servable = [each for each in state.trajectories if state.can_serve(each)]
    else:
        servable = [each for each in state.trajectories if each.request.can_run_on(len(state.ranks))]
    head = min(servable, key=lambda trajectory: trajectory.request.deadline_s, default=None)
    if head is None or head.is_running or head.request.deadline_s + OVERDUE_S >= now:
        return None
    needed_s = least_gpu_s(head.request, head.remaining_steps, state.cost)
    return head if state.late_credit_s >= _COVER * min(needed_s, INSTALMENT_S) else None


class Need(NamedTuple):
    """What one request that can be in time still needs.

    latest_s: until when it can wait if it then runs at its fastest.
    gpu_s: rank-seconds at its cheapest.
    """

    deadline_s: float
    latest_s: float
    gpu_s: float


def have_slack(needs: Iterable[Need], num_ranks: int, now: float) -> bool:
    """Whether every request could wait for all with earlier deadlines, and would then still have slack in hand."""
    ahead_s = 0.0
    for need in sorted(needs):
        ahead_s += need.gpu_s / num_ranks
        alone_s = need.deadline_s - need.latest_s
        if need.latest_s - now < ahead_s + max(IN_HAND_S, 3 * alone_s):
            return False
    return True
