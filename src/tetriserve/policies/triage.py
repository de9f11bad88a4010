"""Sorting of the waiting trajectories into those that can still meet their deadlines and those that cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from tetriserve.core.plan import State
from tetriserve.core.request import Request
from tetriserve.core.trajectory import Stage, Trajectory
from tetriserve.policies.allocation import EPSILON_S, Segment, cheapest_mix
from tetriserve.policies.facts import Facts
from tetriserve.policies.rounds import RoundClock, RoundTable, round_table
from tetriserve.policies.stages import urgency_order


class Terms(NamedTuple):
    """What one kind of request takes on the living ranks, in seconds.

    encode_s, decode_s: with the time to start them.
    table: None when even the narrowest degree is too wide.
    """

    encode_s: float
    decode_s: float
    switch_s: float
    table: RoundTable | None


class ShortStage(NamedTuple):
    """A trajectory whose next stage is encode or decode.

    order: priority class, then deadline.
    latest_start_s: when it has to start at the latest for the request to finish in time.
    duration_s: with the time to start it.
    """

    trajectory: Trajectory
    order: tuple[int, float, float, str]
    latest_start_s: float
    duration_s: float


class Candidate(NamedTuple):
    """A trajectory whose next stage is denoise.

    order: priority class, then when it has to start at its fastest degree to finish in time: least slack first.
    latest_start_s: from when on no allocation meets the deadline.
    denoised_by_s: when the last step has to end for decode to end by the deadline.
    """

    trajectory: Trajectory
    order: tuple[int, float]
    latest_start_s: float
    denoised_by_s: float
    table: RoundTable

    @property
    def priority(self) -> int:
        return self.order[0]

    def allocation(self, denoise_from_s: float) -> Sequence[Segment]:
        """The cheapest way to meet the deadline (section 4.2.1); empty when there is none."""
        num_steps = self.trajectory.remaining_steps
        budget_s = self.denoised_by_s - denoise_from_s
        # Whole rounds are the honest price of a degree; near the deadline only the bare steps may still fit.
        segments = cheapest_mix(num_steps, budget_s, self.table.paced)
        return segments or cheapest_mix(num_steps, budget_s, self.table.efficient) or ()


@dataclass(slots=True)
class Triage:
    """The waiting trajectories by what they need next.

    short: priority classes in order, earlier deadlines first.
    late_short: in order of arrival.
    on_time: priority classes in order, least slack first.
    late: priority classes in order, oldest first.
    """

    short: list[ShortStage] = field(default_factory=list)
    late_short: list[ShortStage] = field(default_factory=list)
    on_time: list[Candidate] = field(default_factory=list)
    late: list[Candidate] = field(default_factory=list)


class Sorter:
    """Sorts the waiting trajectories. Late means that the deadline cannot be met even at the fastest, started now."""

    def __init__(self, clock: RoundClock) -> None:
        self.clock = clock
        self._facts: Facts[Terms, ShortStage | Candidate | None] = Facts(self._terms_of, next_stage)

    def triage(self, state: State, now: float) -> Triage:
        sorted_out = Triage()
        for fact in self._facts.of(state.waiting, state):
            if fact is None:
                continue  # its narrowest degree waits for ranks to come back
            is_late = now > fact.latest_start_s + EPSILON_S
            if isinstance(fact, Candidate):
                (sorted_out.late if is_late else sorted_out.on_time).append(fact)
            else:
                (sorted_out.late_short if is_late else sorted_out.short).append(fact)
        sorted_out.short.sort(key=attrgetter("order"))
        sorted_out.on_time.sort(key=attrgetter("order"))
        sorted_out.late.sort(key=attrgetter("priority"))  # sorting is stable: the oldest stay first
        return sorted_out

    def gpu_s(self, candidate: Candidate, denoise_from_s: float, state: State) -> float:
        """Rank-seconds that `candidate`, of any sorter, needs in these rounds to be in time, or else at its fastest."""
        table = self._table_of(candidate.trajectory.request, state)
        assert table is not None, "a candidate has a degree"
        num_steps = candidate.trajectory.remaining_steps
        gpu_s = {degree: step_gpu_s for degree, _, step_gpu_s in table.paced}
        mix = cheapest_mix(num_steps, candidate.denoised_by_s - denoise_from_s, table.paced)
        if mix is None:
            return num_steps * table.paced[-1][2]
        return sum(segment.num_steps * gpu_s[segment.degree] for segment in mix)

    def _terms_of(self, request: Request, state: State) -> Terms:
        cost, switch_s = state.cost, state.cost.switch_s
        table = self._table_of(request, state)
        return Terms(switch_s + cost.encode_s(request), switch_s + cost.decode_s(request), switch_s, table)

    def _table_of(self, request: Request, state: State) -> RoundTable | None:
        cost = state.cost
        return round_table(tuple(cost.step_times(request).items()), len(state.ranks), cost.switch_s, self.clock)


def next_stage(trajectory: Trajectory, terms: Terms) -> ShortStage | Candidate | None:
    """What `trajectory` needs next; None when no degree is narrow enough for its steps."""
    request = trajectory.request
    denoised_by_s = request.deadline_s - terms.decode_s
    if trajectory.stage is Stage.DECODE:
        return ShortStage(trajectory, urgency_order(trajectory), denoised_by_s, terms.decode_s)
    table = terms.table
    if table is None:
        return None
    num_steps = trajectory.remaining_steps
    fastest_from_s = denoised_by_s - terms.switch_s - num_steps * table.fastest_s
    if trajectory.stage is Stage.ENCODE:
        order = urgency_order(trajectory)
        return ShortStage(trajectory, order, fastest_from_s - terms.encode_s, terms.encode_s)
    latest_start_s = denoised_by_s - terms.switch_s - num_steps * table.quickest_s
    return Candidate(trajectory, (request.priority, fastest_from_s), latest_start_s, denoised_by_s, table)
