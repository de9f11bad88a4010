"""Sorting of the waiting trajectories into those that can still meet their deadlines and those that cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from tetriserve.core.cost import times_per_step
from tetriserve.core.plan import State
from tetriserve.core.request import Request
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.allocation import EPSILON_S, Segment, cheapest_mix
from tetriserve.policies.degrees import EfficientDegree
from tetriserve.policies.facts import Facts
from tetriserve.policies.rounds import RoundClock, RoundTable, round_table
from tetriserve.policies.stages import Ahead, Paces, ahead_of, in_time, urgency_order


class RoundTerms(NamedTuple):
    """What one kind of request takes on the living ranks, in seconds.

    ahead: by stage.
    table: None when even the narrowest degree is too wide.
    """

    ahead: tuple[Ahead, ...]
    switch_s: float
    table: RoundTable | None


class ShortStage(NamedTuple):
    """A trajectory whose next stage is short.

    order: priority class, then deadline.
    latest_start_s: when it has to start at the latest for the request to finish in time at its fastest.
    paces: of the stage.
    duration_s: at its cheapest.
    """

    trajectory: Trajectory
    order: tuple[int, float, float, str]
    latest_start_s: float
    paces: Paces

    @property
    def duration_s(self) -> float:
        return self.paces[0][1]

    def pace(self, now: float, num_ranks: int) -> EfficientDegree:
        """The cheapest on so many ranks at which the request can be in time if the stage starts now."""
        return in_time(self.paces, self.latest_start_s - now + self.paces[-1][1], num_ranks)


class Candidate(NamedTuple):
    """A trajectory whose next stage has steps.

    order: priority class, then when it has to start at its fastest degree to finish in time: least slack first.
    latest_start_s: from when on no allocation meets the deadline.
    steps_by_s: when the last step has to end for what follows to end by the deadline.
    saving_by_s: the same with what follows at its cheapest.
    """

    trajectory: Trajectory
    order: tuple[int, float]
    latest_start_s: float
    steps_by_s: float
    saving_by_s: float
    table: RoundTable

    @property
    def priority(self) -> int:
        return self.order[0]

    def allocation(self, steps_from_s: float) -> Sequence[Segment]:
        """The cheapest way to meet the deadline (section 4.2.1); empty when there is none."""
        num_steps = self.trajectory.remaining_steps
        for by_s in dict.fromkeys((self.saving_by_s, self.steps_by_s)):
            # Whole rounds are the honest price of a degree; near the deadline only the bare steps may still fit.
            for degrees in (self.table.paced, self.table.efficient):
                if segments := cheapest_mix(num_steps, by_s - steps_from_s, degrees):
                    return segments
        return ()


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
        self._facts: Facts[RoundTerms, ShortStage | Candidate | None] = Facts(self._terms_of, next_stage)

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

    def gpu_s(self, candidate: Candidate, steps_from_s: float, state: State) -> float:
        """Rank-seconds that `candidate`, of any sorter, needs in these rounds to be in time, or else at its fastest."""
        table = self._table_of(candidate.trajectory.request, state)
        assert table is not None, "a candidate has a degree"
        num_steps = candidate.trajectory.remaining_steps
        gpu_s = {degree: step_gpu_s for degree, _, step_gpu_s in table.paced}
        mix = cheapest_mix(num_steps, candidate.steps_by_s - steps_from_s, table.paced)
        if mix is None:
            return num_steps * table.paced[-1][2]
        return sum(segment.num_steps * gpu_s[segment.degree] for segment in mix)

    def _terms_of(self, request: Request, state: State) -> RoundTerms:
        return RoundTerms(ahead_of(request, state), state.cost.switch_s, self._table_of(request, state))

    def _table_of(self, request: Request, state: State) -> RoundTable | None:
        cost, num_ranks = state.cost, state.num_ranks_for(request, request.stepped)
        return round_table(tuple(times_per_step(cost, request).items()), num_ranks, cost.switch_s, self.clock)


def next_stage(trajectory: Trajectory, terms: RoundTerms) -> ShortStage | Candidate | None:
    """What `trajectory` needs next; None when no degree is narrow enough for its steps."""
    request, here = trajectory.request, terms.ahead[trajectory.stage_index]
    if not here.has_steps:
        return ShortStage(trajectory, urgency_order(trajectory), request.deadline_s - here.rest_s, here.short)
    table = terms.table
    if table is None:
        return None
    num_steps = trajectory.remaining_steps
    steps_by_s, saving_by_s = (request.deadline_s - (here.after[at][1] if here.after else 0.0) for at in (-1, 0))
    fastest_from_s = steps_by_s - terms.switch_s - num_steps * table.fastest_s
    if trajectory.is_short:
        order = urgency_order(trajectory)
        return ShortStage(trajectory, order, fastest_from_s - here.before[-1][1], here.short)
    latest_start_s = steps_by_s - terms.switch_s - num_steps * table.quickest_s
    order_of_slack = request.priority, fastest_from_s
    return Candidate(trajectory, order_of_slack, latest_start_s, steps_by_s, saving_by_s, table)
