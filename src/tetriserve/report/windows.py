"""What changes while a run goes on: attainment and degree in a window that moves over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TypeAlias

from tetriserve.workload.outcome import Outcome

RunOutcomes: TypeAlias = Sequence[Outcome]
Points: TypeAlias = list[tuple[float, float]]

NUM_POINTS = 60
WINDOWS_PER_RUN = 12


def sar_over_time(runs: Sequence[RunOutcomes]) -> Points:
    """Attained over all, of the requests that arrived in the window around each point of time, all runs together.

    A window spans a `WINDOWS_PER_RUN`-th of the shortest run's arrivals. NaN where none arrived.
    """
    arrivals = sorted((outcome.request.arrival_s, outcome.is_attained) for run in runs for outcome in run)

    def value(start_s: float, end_s: float) -> float:
        inside = [is_attained for arrival_s, is_attained in arrivals if start_s <= arrival_s < end_s]
        return fmean(inside) if inside else math.nan

    return _points(runs, value)


def degree_over_time(runs: Sequence[RunOutcomes]) -> Points:
    """The mean degree of denoise tasks in the window around each point of time, each by the seconds that it ran in it.

    NaN where none ran.
    """
    tasks = [
        (task_run.start_s, task_run.end_s, task_run.task.degree)
        for run in runs
        for outcome in run
        for task_run in outcome.runs
        if task_run.task.num_steps
    ]

    def value(start_s: float, end_s: float) -> float:
        seconds = rank_seconds = 0.0
        for task_start_s, task_end_s, degree in tasks:
            overlap_s = min(end_s, task_end_s) - max(start_s, task_start_s)
            if overlap_s > 0:
                seconds += overlap_s
                rank_seconds += overlap_s * degree
        return rank_seconds / seconds if seconds else math.nan

    return _points(runs, value)


def _points(runs: Sequence[RunOutcomes], value: Callable[[float, float], float]) -> Points:
    end_s = min(max(outcome.request.arrival_s for outcome in run) for run in runs)
    if end_s == 0:
        return []  # all at once: nothing changes over time
    window_s = end_s / WINDOWS_PER_RUN
    times = [end_s * number / NUM_POINTS for number in range(NUM_POINTS + 1)]
    # Half a window in from both ends, where it would look at less than a window.
    return [
        (time_s, value(time_s - window_s / 2, time_s + window_s / 2))
        for time_s in times
        if window_s / 2 <= time_s <= end_s - window_s / 2
    ]
