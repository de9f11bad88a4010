"""What is expected to happen: the future of a pool as far as it can be known, and what can be promised from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tetriserve.core.events import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What becomes of the requests of one moment if nobody else comes. Times are seconds since the engine started.

    now: the moment.
    runs: tasks in flight and tasks to come, in order of their starts: what a task is (request, stage, ranks, number of
        steps), and from when to when it runs.
    finish_s: when each request ends, by id. Left out are those that do not end within the time looked at, or never.
    """

    now: float
    runs: tuple[Run, ...]
    finish_s: Mapping[str, float]

    def degrees(self, request_id: str) -> tuple[int, ...]:
        """The degree of every step of a request that is in flight or to come."""
        return tuple(
            run.task.degree for run in self.runs if request_id in run.task.members for _ in range(run.task.num_steps)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotedRequest:
    """What is expected of one request: when it would end (infinite: never), and the degree of each of its steps."""

    finish_s: float
    degrees: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """What could be promised to requests that come together. Times are seconds since the engine started.

    is_feasible: in the forecast all of them end by their deadline, with a little to spare, and everybody who would be
        in time without them still is.
    arrival_s, deadline_s: when they came, and the deadline asked for.
    earliest_deadline_s: the earliest deadline found of which the same can be said; infinite if there is none. Asked
        for at once, it is feasible. An earlier one may exist: few are tried.
    position: requests now waiting that would start, or go on, before the first of these.
    requests: what is expected of each, in order.
    """

    is_feasible: bool
    arrival_s: float
    deadline_s: float
    earliest_deadline_s: float
    position: int
    requests: tuple[QuotedRequest, ...]

    @property
    def finish_s(self) -> float:
        """When the last of them ends with the deadline asked for; infinite: never."""
        return max(expected.finish_s for expected in self.requests)
