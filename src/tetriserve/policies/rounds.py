"""The fixed grid of rounds, and what one round holds of each shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from tetriserve.core.plan import InFlight
from tetriserve.policies.degrees import EfficientDegree, efficient_degrees, fastest_degree


@dataclass(frozen=True, slots=True)
class Round:
    """One round of the grid, in seconds since the engine started."""

    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundClock:
    """Rounds of `round_s` seconds on the grid k * round_s.

    Predictions are a little off and timers fire a little early or late, so the grid is read with three tolerances:

    early_s: a moment this close before a boundary counts as the boundary.
    grace_s: after a boundary, tasks that are predicted to end within it are waited for.
    overrun_s: a task may be predicted to end this long after its boundary, and by at most a quarter of its own step.
        Without it, a short stage at the start of a round would cost the reference shape a whole step of that round.
    """

    round_s: float
    early_s: float
    grace_s: float
    overrun_s: float

    @classmethod
    def of(cls, round_s: float) -> RoundClock:
        """Tolerances of 2, 10 and 5 percent of the round."""
        return cls(round_s=round_s, early_s=0.02 * round_s, grace_s=0.1 * round_s, overrun_s=0.05 * round_s)

    def round_at(self, now: float) -> Round:
        """The round that `now` belongs to; its end is always after `now`."""
        index = math.floor((now + self.early_s) / self.round_s)
        return Round(index * self.round_s, (index + 1) * self.round_s)

    def grace_end_s(self, this: Round) -> float:
        return this.start_s + self.grace_s

    def steps_that_fit(self, available_s: float, step_s: float) -> int:
        """Whole steps that end within `available_s`, the overrun allowed."""
        return max(0, int((available_s + min(self.overrun_s, 0.25 * step_s)) / step_s))

    def is_within_round(self, duration_s: float) -> bool:
        """Whether something that starts as late as the end of the grace still ends within its round."""
        return duration_s <= self.round_s - self.grace_s

    def is_about_to_end(self, flight: InFlight, this: Round) -> bool:
        """Whether `flight` was to end around the start of `this` round. One that is a whole round overdue is not."""
        return this.start_s - self.round_s < flight.end_s <= self.grace_end_s(this)


@dataclass(frozen=True, slots=True)
class Window:
    """What is left of `round` for a task that starts at `now`, `switch_s` of which it spends on starting."""

    clock: RoundClock
    round: Round
    now: float
    switch_s: float

    def steps_that_fit(self, step_s: float) -> int:
        """Steps that a denoise task can run by the boundary."""
        return self.clock.steps_that_fit(self.round.end_s - self.now - self.switch_s, step_s)

    def end_of(self, num_steps: int, step_s: float) -> float:
        """When a task of `num_steps` ends."""
        return self.now + self.switch_s + num_steps * step_s

    def may_start(self, duration_s: float) -> bool:
        """Whether a stage ends by the boundary, or is too long to end by any and may as well start now."""
        ends_by_boundary = self.now + duration_s <= self.round.end_s + self.clock.overrun_s
        return ends_by_boundary or not self.clock.is_within_round(duration_s)


@dataclass(frozen=True, slots=True)
class RoundTable:
    """What the rounds make of one shape's step times.

    times: seconds per step by degree, ascending, for the degrees that the policy uses.
    fastest_s: the shortest of them.
    efficient: `efficient_degrees` of `times`.
    paced: the same for round-paced step times: a round that holds q steps makes each of them round_s / q, because the
        rest of the round is too short for another step. A budget divided by these is a number of whole rounds.
    carries_over: no step fits in a round, so that tasks are single steps that overlap rounds.
    """

    times: Mapping[int, float]
    fastest_s: float
    efficient: tuple[EfficientDegree, ...]
    paced: tuple[EfficientDegree, ...]
    carries_over: bool

    @property
    def narrowest(self) -> int:
        return next(iter(self.times))


@lru_cache(maxsize=1024)
def round_table(
    step_times: tuple[tuple[int, float], ...], max_degree: int, switch_s: float, clock: RoundClock
) -> RoundTable | None:
    """The table of one shape on `max_degree` living ranks; None when none of its degrees is that narrow.

    Degrees whose step does not fit in a round are left out, because they would hold ranks across the boundary where
    wide groups assemble. A shape without any other degree keeps its fastest one, in tasks of one step.
    """
    times = {degree: step_s for degree, step_s in step_times if degree <= max_degree}
    if not times:
        return None
    fitting = {degree: step_s for degree, step_s in times.items() if clock.is_within_round(switch_s + step_s)}
    if not fitting:
        degree = fastest_degree(times)
        lone = {degree: times[degree]}
        efficient = efficient_degrees(lone)
        return RoundTable(lone, times[degree], efficient, efficient, carries_over=True)
    full_s = clock.round_s - switch_s
    paced = {degree: clock.round_s / clock.steps_that_fit(full_s, step_s) for degree, step_s in fitting.items()}
    return RoundTable(
        fitting, min(fitting.values()), efficient_degrees(fitting), efficient_degrees(paced), carries_over=False
    )
