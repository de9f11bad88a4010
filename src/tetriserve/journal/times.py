"""The same facts on another clock: what the journal holds counts from an entry's arrival, an engine from its start."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tetriserve.core.events import Run
from tetriserve.core.request import Request
from tetriserve.workload.outcome import Outcome


def moved_request(request: Request, by_s: float) -> Request:
    return replace(request, arrival_s=request.arrival_s + by_s, deadline_s=request.deadline_s + by_s)


def moved_runs(runs: Iterable[Run], by_s: float) -> tuple[Run, ...]:
    return tuple(replace(run, start_s=run.start_s + by_s, end_s=run.end_s + by_s) for run in runs)


def moved_outcome(outcome: Outcome, by_s: float) -> Outcome:
    return replace(
        outcome,
        request=moved_request(outcome.request, by_s),
        runs=moved_runs(outcome.runs, by_s),
        predicted_finish_s=outcome.predicted_finish_s + by_s,
        finish_s=outcome.finish_s + by_s,
    )
