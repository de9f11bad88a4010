"""Sorting of the waiting trajectories into those that can still meet their deadlines and those that cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tetriserve.core.plan import State
from tetriserve.core.trajectory import Stage, Trajectory
from tetriserve.policies.allocation import Segment, cheapest_mix
from tetriserve.policies.rounds import RoundClock, RoundTable, round_table
from tetriserve.policies.stages import short_stage_s, urgency_order


class Candidate(NamedTuple):
    """A trajectory whose next stage is denoise.

    segments: the allocation that just meets the deadline; empty for a late one.
    denoised_by_s: when the last step has to end for decode to end by the deadline.
    slack_s: how long it could wait and still finish in time at its fastest degree; negative for a late one.
    """

    trajectory: Trajectory
    table: RoundTable
    segments: Sequence[Segment]
    denoised_by_s: float
    slack_s: float

    @property
    def priority(self) -> int:
        return self.trajectory.request.priority


@dataclass(slots=True)
class Triage:
    """The waiting trajectories by what they need next.

    short, late_short: encode or decode; priority classes in order, earlier deadlines first.
    on_time: denoise; priority classes in order, least slack first.
    late: denoise; priority classes in order, oldest first.
    """

    short: list[Trajectory] = field(default_factory=list)
    late_short: list[Trajectory] = field(default_factory=list)
    on_time: list[Candidate] = field(default_factory=list)
    late: list[Candidate] = field(default_factory=list)


def triage(state: State, now: float, clock: RoundClock) -> Triage:
    """Sort `state.waiting`. Late means that the deadline cannot be met even at the fastest degree, started now."""
    sorted_out = Triage()
    cost = state.cost
    switch_s = cost.switch_s
    max_degree = len(state.ranks)
    for trajectory in state.waiting:
        request = trajectory.request
        stage = trajectory.stage
        if stage is Stage.DECODE:
            is_late = now + short_stage_s(trajectory, cost) > request.deadline_s
            (sorted_out.late_short if is_late else sorted_out.short).append(trajectory)
            continue
        table = round_table(tuple(cost.step_times(request).items()), max_degree, switch_s, clock)
        if table is None:
            continue  # its narrowest degree waits for ranks to come back
        denoised_by_s = request.deadline_s - cost.decode_s(request) - switch_s
        num_steps = trajectory.remaining_steps
        if stage is Stage.ENCODE:
            denoise_from_s = now + short_stage_s(trajectory, cost) + switch_s
            is_late = denoise_from_s + num_steps * table.fastest_s > denoised_by_s
            (sorted_out.late_short if is_late else sorted_out.short).append(trajectory)
            continue
        budget_s = denoised_by_s - now - switch_s
        # Whole rounds are the honest price of a degree; near the deadline only the bare steps may still fit.
        segments = cheapest_mix(num_steps, budget_s, table.paced) or cheapest_mix(num_steps, budget_s, table.efficient)
        slack_s = budget_s - num_steps * table.fastest_s
        candidate = Candidate(trajectory, table, segments or (), denoised_by_s, slack_s)
        (sorted_out.on_time if segments else sorted_out.late).append(candidate)

    sorted_out.short.sort(key=urgency_order)
    sorted_out.late_short.sort(key=urgency_order)
    sorted_out.on_time.sort(key=lambda candidate: (candidate.priority, candidate.slack_s))
    sorted_out.late.sort(key=lambda candidate: (candidate.priority, candidate.trajectory.request.arrival_s))
    return sorted_out
