"""Quotes: the deadline that could be promised to requests that come now, from forecasts with and without them.

A promise is kept by the policy that serves, so it is the policy that is asked: every answer is a forecast in which the
newcomers have some deadline. What is promised to them must not be taken from others: a request that would be in time
without them has to be in time with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from tetriserve.control.controller import Controller
from tetriserve.control.spare import LEAST_SPARE
from tetriserve.control.whatif import forecast
from tetriserve.core.forecast import Forecast, Quote, QuotedRequest
from tetriserve.core.request import Request
from tetriserve.policies.policy import Policy

MAX_TRIALS = 5
"""Deadlines that are tried for one quote, the one asked for included."""
MAX_TASKS = 150
"""After forecasts of so many tasks no further deadline is tried, but for one if the one asked for was not feasible: it
bounds the time that a quote takes."""

_RESOLUTION_PER_REQUEST = 0.01
_COARSEST = 1.0
_TICKS_PER_S = 1000
"""Deadlines are tried in whole ticks from arrival: what is answered can be asked for again, digit by digit."""


class Foresight:
    """Looks ahead by the policy that serves, and leaves the controllers that it is given as they are.

    Args:
        new_policy: makes a policy of the kind that serves; every forecast gets one of its own.
    """

    def __init__(self, new_policy: Callable[[], Policy]) -> None:
        self._new_policy = new_policy

    def forecast(self, controller: Controller, now: float) -> Forecast:
        """The future of what is there: exact if little is, and the coarser the more requests are unfinished."""
        return forecast(controller, now, self._new_policy(), resolution=_resolution(controller, 0))

    def quote(
        self,
        controller: Controller,
        now: float,
        requests: Sequence[Request],
        without: Forecast,
        *,
        spare: float = LEAST_SPARE,
        is_brief: bool = False,
    ) -> Quote:
        """What could be promised to `requests`, which came together at `now` or just before, and are not admitted.

        They share one deadline, the earliest of theirs, which is tried first. Then, feasible or not, the end that was
        forecast for it; then deadlines between the latest that failed and the earliest that did not, by bisection.

        Args:
            without: the forecast without them, of about the same moment.
            spare: what promises keep in hand, as a fraction of the time until the forecast finish.
            is_brief: try no other deadline. It takes a fraction of the time, and says no more than yes or no.
        """
        return _QuoteSearch(self._new_policy, controller, now, requests, without, spare).quote(is_brief)


def _resolution(controller: Controller, num_more: int) -> float:
    return min(_COARSEST, _RESOLUTION_PER_REQUEST * (controller.num_unfinished + num_more))


@dataclass(frozen=True, slots=True)
class _Trial:
    """One deadline tried. finish_s: when the last newcomer ends; promised_s: with what a promise keeps in hand."""

    deadline_s: float
    forecast: Forecast
    finish_s: float
    promised_s: float
    is_feasible: bool

    @property
    def known_s(self) -> float:
        """The earliest deadline that this alone confirms; infinite if it confirms none."""
        return self.deadline_s if self.is_feasible else math.inf


class _QuoteSearch:
    """Forecasts of one moment with the newcomers at several deadlines.

    protected: until when those who are in time without them have to end, by request id. Who has the spare in hand keeps
        it: else every newcomer would take a little of it.
    """

    def __init__(
        self,
        new_policy: Callable[[], Policy],
        controller: Controller,
        now: float,
        requests: Sequence[Request],
        without: Forecast,
        spare: float,
    ) -> None:
        self._new_policy = new_policy
        self._controller = controller
        self._now = now
        self._requests = requests
        self._arrival_s = requests[0].arrival_s
        self._without = without
        self._resolution = _resolution(controller, len(requests))
        self._spare = spare
        self._protected = _bounds(controller, without, now, spare)
        self._num_tasks = 0

    def quote(self, is_brief: bool) -> Quote:
        asked = self._try(min(request.deadline_s for request in self._requests))
        waiting = {trajectory.request_id for trajectory in self._controller.state.waiting}
        finish_s = asked.forecast.finish_s
        return Quote(
            is_feasible=asked.is_feasible,
            arrival_s=self._arrival_s,
            deadline_s=asked.deadline_s,
            earliest_deadline_s=asked.known_s if is_brief else self._earliest(asked),
            position=_position(asked.forecast, {request.request_id for request in self._requests}, waiting),
            requests=tuple(
                QuotedRequest(
                    finish_s=finish_s.get(request.request_id, math.inf),
                    degrees=asked.forecast.degrees(request.request_id),
                )
                for request in self._requests
            ),
        )

    def _try(self, deadline_s: float) -> _Trial:
        requests = [replace(request, deadline_s=deadline_s) for request in self._requests]
        newcomers = dict.fromkeys((request.request_id for request in requests), math.inf)
        course = forecast(
            self._controller,
            self._now,
            self._new_policy(),
            more=requests,
            awaited={**newcomers, **self._protected},
            resolution=self._resolution,
        )
        self._num_tasks += len(course.runs)
        finish_s = max(course.finish_s.get(name, math.inf) for name in newcomers)
        is_harmless = all(course.finish_s.get(name, math.inf) <= by_s for name, by_s in self._protected.items())
        promised_s = finish_s + self._spare * (finish_s - self._now)
        return _Trial(deadline_s, course, finish_s, promised_s, promised_s <= deadline_s and is_harmless)

    def _earliest(self, asked: _Trial) -> float:
        """The earliest deadline that some trial confirms; infinite if none does."""
        confirmed_s, refuted_s = (asked.deadline_s, self._now) if asked.is_feasible else (math.inf, asked.deadline_s)
        candidate_s, last = asked.promised_s, asked
        if candidate_s <= refuted_s:  # in time, but at the expense of others: whoever comes last is at nobody's
            candidate_s += max(self._without.finish_s.values(), default=refuted_s) - self._now
        for number in range(1, MAX_TRIALS):
            candidate_s = self._in_ticks(candidate_s)
            is_long_enough = self._num_tasks > MAX_TASKS and (number > 1 or confirmed_s < math.inf)
            if is_long_enough or not refuted_s < candidate_s < confirmed_s:
                break
            trial = self._try(candidate_s)
            if trial.is_feasible:
                confirmed_s = candidate_s
                if math.isclose(trial.finish_s, last.finish_s):
                    break  # a tighter deadline does not bring it forward
            else:
                refuted_s = candidate_s
            last = trial
            if confirmed_s < math.inf:
                candidate_s = (refuted_s + confirmed_s) / 2
            else:
                candidate_s = self._now + 2 * (max(candidate_s, trial.promised_s) - self._now)
        return confirmed_s

    def _in_ticks(self, time_s: float) -> float:
        """The first tick from `time_s` on."""
        if math.isinf(time_s):
            return time_s
        return self._arrival_s + math.ceil((time_s - self._arrival_s) * _TICKS_PER_S) / _TICKS_PER_S


def _bounds(controller: Controller, course: Forecast, now: float, spare: float) -> Mapping[str, float]:
    """Until when those who keep their deadlines have to end, by request id."""
    bounds = {}
    for trajectory in controller.state.trajectories:
        finish_s = course.finish_s.get(trajectory.request_id, math.inf)
        deadline_s = trajectory.request.deadline_s
        with_spare_s = now + (deadline_s - now) / (1 + spare)
        if finish_s <= deadline_s:
            bounds[trajectory.request_id] = with_spare_s if finish_s <= with_spare_s else deadline_s
    return bounds


def _position(course: Forecast, newcomers: Set[str], waiting: Set[str]) -> int:
    ahead: set[str] = set()
    for run in course.runs:
        if not newcomers.isdisjoint(run.task.members):
            break
        ahead.update(waiting & set(run.task.members))
    return len(ahead)
