"""Rounds: when one ends, and what it holds of each shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from tetriserve.core.plan import InFlight
from tetriserve.policies.degrees import EfficientDegree, efficient_degrees, fastest_degree

MIN_ROUND_S = 0.05
"""Shorter rounds, which a very small model would get, spend their time on dispatch."""

STEP_GRANULARITY = 5
"""Steps of the reference shape in the paper's round; the most that a round of varying length has."""

_EPSILON_S = 1e-9
"""Rounding slack: steps that fill what is left of a round exactly do fit."""


def fixed_round(step_granularity: int, step_times: Mapping[int, float], switch_s: float) -> float:
    """Seconds of a round of `step_granularity` steps of the reference shape at its fastest degree (TetriServe, 4.2)."""
    return max(MIN_ROUND_S, switch_s + step_granularity * min(step_times.values()))


def round_lengths(step_times: Mapping[int, float], switch_s: float, slack_s: float) -> tuple[float, ...]:
    """The lengths that a round may have, in seconds, longest first.

    The longest holds `STEP_GRANULARITY` steps of the reference shape at its fastest degree, fewer where `slack_s` is
    shorter, but one: a request that arrives when all ranks are taken waits for the end of the round. The others hold
    as many whole steps at each other degree as end within the longest.

    Args:
        step_times: seconds per step of the reference shape by degree.
        switch_s: seconds to start a task; part of the round, which would otherwise hold one step less.
        slack_s: how long a request that arrives can wait.
    """
    fastest_s = min(step_times.values())
    num_fastest = max(1, int(min(STEP_GRANULARITY, (slack_s - switch_s) / fastest_s)))
    counts = {step_s: int(num_fastest * fastest_s / step_s + _EPSILON_S) for step_s in step_times.values()}
    lengths = {max(MIN_ROUND_S, switch_s + count * step_s) for step_s, count in counts.items() if count}
    return tuple(sorted(lengths, reverse=True))


@dataclass(frozen=True, slots=True)
class Round:
    """One round, in seconds since the engine started. `is_open` until the first of its tasks with steps has started."""

    start_s: float
    end_s: float
    is_open: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundClock:
    """Rounds of at most `round_s` seconds.

    There is no grid: a round ends when the last of its tasks with steps is predicted to end, and then the next starts.
    What starts in mid-round ends by that moment, so the whole pool comes together at it, and when tasks are a little
    late or early the boundary moves with them. Predictions are a little off; three tolerances absorb that:

    early_s: a round this close to its end counts as over.
    grace_s: tasks of the last round are waited for this long after they should have ended.
    overrun_s: the first tasks of a round may be predicted to end this much after `round_s`, and by at most a quarter
        of their own step: else a slightly slower model would cost the reference shape a whole step in every round.
    """

    round_s: float
    early_s: float
    grace_s: float
    overrun_s: float

    @classmethod
    def of(cls, round_s: float) -> RoundClock:
        """Tolerances of 2, 10 and 5 percent of the round."""
        return cls(round_s=round_s, early_s=0.02 * round_s, grace_s=0.1 * round_s, overrun_s=0.05 * round_s)

    def round_at(self, in_flight: Iterable[InFlight], now: float) -> Round:
        """The round that `now` belongs to; it always ends after `now`. A task that is long overdue does not count."""
        ends = [flight.end_s for flight in in_flight if flight.task.num_steps and flight.end_s > now - self.grace_s]
        if not ends:
            return Round(now, now + self.round_s, is_open=True)
        end_s = max(ends)
        if end_s <= now + self.early_s:
            return Round(end_s, end_s + self.round_s, is_open=True)
        return Round(end_s - self.round_s, min(end_s, now + self.round_s), is_open=False)

    def grace_end_s(self, this: Round) -> float:
        return this.start_s + self.grace_s

    def steps_that_fit(self, available_s: float, step_s: float, *, is_open: bool = True) -> int:
        """Whole steps that end within `available_s`, overrun allowed for in an open round."""
        overrun_s = min(self.overrun_s, 0.25 * step_s) if is_open else _EPSILON_S
        return max(0, int((available_s + overrun_s) / step_s))

    def is_within_round(self, duration_s: float) -> bool:
        """Whether something that starts as late as the end of the grace still ends within its round."""
        return duration_s <= self.round_s - self.grace_s

    def is_about_to_end(self, flight: InFlight, this: Round) -> bool:
        """Whether `flight` was to end around the start of `this` round. One that is long overdue is not."""
        return this.start_s - self.grace_s < flight.end_s <= self.grace_end_s(this)


@dataclass(frozen=True, slots=True)
class Window:
    """What is left of `round` for a task that starts at `now`, `switch_s` of which it spends on starting."""

    clock: RoundClock
    round: Round
    now: float
    switch_s: float

    def steps_that_fit(self, step_s: float) -> int:
        """Steps that a task can run by the end of the round."""
        available_s = self.round.end_s - self.now - self.switch_s
        return self.clock.steps_that_fit(available_s, step_s, is_open=self.round.is_open)

    def end_of(self, num_steps: int, step_s: float) -> float:
        """When a task of `num_steps` ends."""
        return self.now + self.switch_s + num_steps * step_s

    def may_start(self, duration_s: float) -> bool:
        """Whether a stage ends by the end of the round, or is too long for any and may as well start now."""
        ends_in_time = self.now + duration_s <= self.round.end_s + self.clock.overrun_s
        return ends_in_time or not self.clock.is_within_round(duration_s)


@dataclass(frozen=True, slots=True)
class RoundTable:
    """What the rounds make of one shape's step times.

    times: seconds per step by degree, ascending, for the degrees that the policy uses.
    fastest_s: the shortest of them.
    efficient: `efficient_degrees` of `times`.
    paced: the same for round-paced step times: a round that holds q steps makes each of them round_s / q, because the
        rest of the round is too short for another step. A budget divided by these is a number of whole rounds.
    carries_over: no step fits in a round, so that tasks are single steps that overlap rounds.
    narrowest: the smallest of the degrees.
    """

    times: Mapping[int, float]
    fastest_s: float
    efficient: tuple[EfficientDegree, ...]
    paced: tuple[EfficientDegree, ...]
    carries_over: bool
    narrowest: int

    @property
    def quickest_s(self) -> float:
        """The least that a step counts for in an allocation: what may overrun a round is paced as if it did not."""
        return min(self.efficient[-1][1], self.paced[-1][1])


@lru_cache(maxsize=1024)
def round_table(
    step_times: tuple[tuple[int, float], ...], max_degree: int, switch_s: float, clock: RoundClock
) -> RoundTable | None:
    """The table of one shape on `max_degree` living ranks; None when none of its degrees is that narrow.

    Degrees whose step does not fit in a round are left out, because they would hold ranks beyond the moment at which
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
        return RoundTable(lone, times[degree], efficient, efficient, carries_over=True, narrowest=degree)
    full_s = clock.round_s - switch_s
    paced = {degree: clock.round_s / clock.steps_that_fit(full_s, step_s) for degree, step_s in fitting.items()}
    return RoundTable(
        fitting,
        min(fitting.values()),
        efficient_degrees(fitting),
        efficient_degrees(paced),
        carries_over=False,
        narrowest=min(fitting),
    )
