"""Reservations: who gets how many ranks, from when to when, so that as many requests as possible end in time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import nsmallest
from operator import attrgetter
from typing import NamedTuple

from tetriserve.core.cost import times_per_step
from tetriserve.core.plan import InFlight, State
from tetriserve.core.request import Request
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.degrees import EfficientDegree, efficient_degrees
from tetriserve.policies.facts import Facts
from tetriserve.policies.stages import Ahead, ahead_of, one_after_another
from tetriserve.policies.timeline import EPSILON_S, NEVER_S, Piece, Timeline

MIN_RESERVED = 12
"""Requests with reservations in a small pool; in a larger one, one per rank."""

DEADLINE_DIGITS = 3
"""Deadlines that agree to the millisecond are equal: the images of one call, and sums of seconds that were rounded."""

_NOTHING: EfficientDegree = (0, 0.0, 0.0)

_SOON_S = 1e-6
"""What should have ended is expected this soon: later than now, and too soon for anything to fit in before it."""


LONG_S = 0.5
"""Steps and short stages longer than this are long: a request that arrives waits for the end of one."""


class Speeds(NamedTuple):
    """What one shape does on the pool.

    times: seconds per step by degree, ascending.
    efficient: `efficient_degrees`, each step with its share of the time that it takes to start a task.
    best: by number of free ranks up to the widest degree, the degree that makes the fastest use of them and its step
        time; degree 0 for none.
    fastest_s: the shortest step.
    """

    times: Mapping[int, float]
    efficient: tuple[EfficientDegree, ...]
    best: tuple[tuple[int, float], ...]
    fastest_s: float

    @property
    def are_long(self) -> bool:
        """Whether a step takes longer than `LONG_S` at every degree."""
        return self.fastest_s > LONG_S


@lru_cache(maxsize=1024)
def speeds_of(
    step_times: tuple[tuple[int, float], ...], num_ranks: int, switch_s: float, task_s: float
) -> Speeds | None:
    """The speeds on `num_ranks` living ranks in tasks of about `task_s`; None when no degree is that narrow."""
    times = {degree: step_s for degree, step_s in step_times if degree <= num_ranks}
    if not times:
        return None
    paced = {degree: step_s + switch_s / max(1, int(task_s / step_s)) for degree, step_s in times.items()}
    best = tuple(
        min(((degree, paced[degree]) for degree in times if degree <= free), key=_step_s, default=(0, math.inf))
        for free in range(max(times) + 1)
    )
    return Speeds(times, efficient_degrees(paced), best, best[-1][1])


def _step_s(pair: tuple[int, float]) -> float:
    return pair[1]


class JobTerms(NamedTuple):
    """What one kind of request takes on the living ranks: its steps, and its stages one by one."""

    speeds: Speeds | None
    ahead: tuple[Ahead, ...]


@dataclass(slots=True, eq=False)
class PendingJob:
    """What is left of one request once its task in flight, if it has one, has ended.

    stage_index: of the stage that comes next; `here` is what lies ahead of it, and `ahead` the same for every stage.
    num_steps: left of the stage with steps, if that is not over.
    ready_s: when its next stage can start, or could have started.
    gpu_s: rank-seconds left at the cheapest degree.
    latest_s: until when it can wait and still end in time at its fastest; what its task in flight takes is no wait.
    order: priority class, then slack.
    deadline_s: of the request.
    members: the jobs that a bundle consists of, in order of their deadlines; none in a job of its own.
    """

    trajectory: Trajectory
    stage_index: int
    num_steps: int
    ready_s: float
    is_waiting: bool
    speeds: Speeds
    ahead: tuple[Ahead, ...]
    here: Ahead
    gpu_s: float
    latest_s: float
    order: tuple[int, float]
    deadline_s: float
    members: tuple[PendingJob, ...] = ()

    @property
    def priority(self) -> int:
        return self.order[0]

    @property
    def num_requests(self) -> int:
        return len(self.members) or 1

    @property
    def widest(self) -> int:
        """The largest degree of its steps, and of the short stage that it is at."""
        return max(len(self.speeds.best) - 1, self.here.short[-1][0] if self.here.short else 1)

    @property
    def parts(self) -> tuple[PendingJob, ...]:
        """The jobs of single requests that it stands for."""
        return self.members or (self,)

    def after(self, flight: InFlight, now: float) -> PendingJob | None:
        """The same request once `flight` has landed; None when that was its last task."""
        stage_index, num_steps = self.stage_index, self.num_steps - flight.task.num_steps
        if self.here.short or not num_steps:
            stage_index += 1
        if stage_index == len(self.ahead):
            return None
        ready_s = expected_end_s(flight, now)
        return _job(
            self.trajectory, stage_index, num_steps, self.speeds, self.ahead, ready_s=ready_s, busy_s=ready_s - now
        )


def _job(
    trajectory: Trajectory,
    stage_index: int,
    num_steps: int,
    speeds: Speeds,
    ahead: tuple[Ahead, ...],
    *,
    ready_s: float,
    busy_s: float | None = None,
) -> PendingJob:
    """busy_s: how long its task in flight still takes; None when it waits."""
    here = ahead[stage_index]
    gpu_s = here.rest_gpu_s + num_steps * speeds.efficient[0][2]
    request = trajectory.request
    deadline_s = request.deadline_s
    latest_s = deadline_s - here.rest_s - num_steps * speeds.fastest_s - (busy_s or 0.0)
    order = request.priority, latest_s
    return PendingJob(
        trajectory, stage_index, num_steps, ready_s, busy_s is None, speeds, ahead, here, gpu_s, latest_s, order,
        deadline_s,
    )  # fmt: skip


def job_of(trajectory: Trajectory, terms: JobTerms) -> PendingJob | None:
    """The job of a trajectory as it stands, without its task in flight; None when no living rank can serve it."""
    if terms.speeds is None:
        return None
    return _job(
        trajectory, trajectory.stage_index, trajectory.remaining_steps, terms.speeds, terms.ahead,
        ready_s=trajectory.request.arrival_s,
    )  # fmt: skip


class JobBook:
    """The jobs at each event, in tasks of about `task_s`."""

    def __init__(self, task_s: float) -> None:
        self._task_s = task_s
        self._facts: Facts[JobTerms, PendingJob | None] = Facts(self._terms_of, job_of)

    def jobs(self, state: State, now: float) -> list[PendingJob]:
        """The jobs of all unfinished requests that some living rank can serve, in order of arrival."""
        jobs = []
        for job in self._facts.of(state.trajectories, state):
            if job is not None and job.trajectory.is_running:
                job = job.after(state.flights[job.trajectory.request_id], now)
            if job is not None:
                jobs.append(job)
        return jobs

    def _terms_of(self, request: Request, state: State) -> JobTerms:
        step_times = tuple(times_per_step(state.cost, request).items())
        num_ranks = state.num_ranks_for(request, request.stepped)
        speeds = speeds_of(step_times, num_ranks, state.cost.switch_s, self._task_s)
        return JobTerms(speeds, ahead_of(request, state))


def bundle_of(jobs: Sequence[PendingJob], speeds: Speeds, now: float) -> PendingJob:
    """Jobs of one kind and class as one that takes the most steps of any, at the `speeds` of a batch.

    What is not of the stage with steps, each does on its own, one after the other: those that have yet to come to that
    stage first. Its deadline is that by which the most pressed of them is in time.
    """
    first = jobs[0]
    num_steps = max([job.num_steps for job in jobs])
    short = next((job.here for job in jobs if job.here.short), None)
    here = Ahead.of(
        () if short is None else short.short,
        one_after_another([job.here.before for job in jobs if job.here.before]),
        one_after_another([job.here.after for job in jobs if job.here.after]),
        has_steps=True,
        role=None if short is None else short.role,
        steps_role=first.here.steps_role,
        after_role=first.here.after_role,
    )
    deadline_s = min([job.deadline_s + (num_steps - job.num_steps) * speeds.fastest_s for job in jobs])
    gpu_s = here.rest_gpu_s + num_steps * speeds.efficient[0][2]
    ready_s = max([job.ready_s for job in jobs])
    latest_s = deadline_s - here.rest_s - num_steps * speeds.fastest_s - max(0.0, ready_s - now)
    is_waiting = all(job.is_waiting for job in jobs)
    return PendingJob(
        first.trajectory, first.stage_index, num_steps, ready_s, is_waiting, speeds, first.ahead, here, gpu_s,
        latest_s, (first.priority, latest_s), deadline_s, tuple(jobs),
    )  # fmt: skip


def expected_end_s(flight: InFlight, now: float) -> float:
    """When a task in flight will end. One that is overdue: soon, and the later the longer it already is."""
    return max(flight.end_s, now + _SOON_S + 0.5 * max(0.0, now - flight.end_s))


def num_reserved(num_ranks: int) -> int:
    """How many requests reserve at most, those with the least slack: bounds the time of a decision."""
    return max(MIN_RESERVED, num_ranks)


class Reservations(NamedTuple):
    """`kept`: the jobs that end in time, with what is claimed for each. `failed`: those that would need more.

    timeline: what `kept` leaves free.
    """

    kept: list[tuple[PendingJob, list[Piece]]]
    failed: list[PendingJob]
    timeline: Timeline

    def _num_kept(self) -> Counter[int]:
        """Requests kept by priority class."""
        kept: Counter[int] = Counter()
        for job, _ in self.kept:
            kept[job.priority] += job.num_requests
        return kept

    def is_better_than(self, other: Reservations) -> bool:
        """More jobs kept, in the first priority class that differs."""
        mine, others = self._num_kept(), other._num_kept()
        return next((mine[p] > others[p] for p in sorted(mine | others) if mine[p] != others[p]), False)


def reserve(
    jobs: Sequence[PendingJob], timeline: Timeline, limit: int, *, promote: bool = True, headroom: int = 0
) -> Reservations:
    """Reservations for the `limit` jobs with least slack out of `jobs`, which all could end in time if alone.

    Earliest deadline first, and of equal deadlines least GPU time left, so that what cannot all be in time ends one
    after the other; each the cheapest reservation that `fit` finds. If some fail, once more with these ahead of the
    rest (`promote`), and the better of both: those in front may have had no need to be, and one large job in front may
    have cost several small ones. Priority classes are never mixed. A job whose steps take longer than `LONG_S` at
    every degree leaves `headroom` ranks free, unless it would then be late.
    """
    pressed = nsmallest(limit, jobs, key=attrgetter("order"))
    chosen = set(pressed)
    others = [job for job in jobs if job not in chosen] if len(jobs) > limit else []
    pressed.sort(key=lambda job: (job.priority, round(job.deadline_s, DEADLINE_DIGITS), job.gpu_s))
    best = _walk(pressed, timeline.copy(), headroom)
    if best.failed and best.kept and promote:
        failed = set(best.failed)
        again = _walk(sorted(pressed, key=lambda job: (job.priority, job not in failed)), timeline.copy(), headroom)
        if again.is_better_than(best):
            best = again
    best.failed.extend(others)
    return best


def _walk(jobs: Iterable[PendingJob], timeline: Timeline, headroom: int) -> Reservations:
    reservations = Reservations([], [], timeline)
    for job in jobs:
        pieces = fit(job, timeline.without(headroom)) if headroom and job.speeds.are_long else None
        if pieces is None:
            pieces = fit(job, timeline)
        if pieces is None:
            reservations.failed.append(job)
        else:
            timeline.claim(pieces)
            reservations.kept.append((job, pieces))
    return reservations


def fit(job: PendingJob, timeline: Timeline) -> list[Piece] | None:
    """The cheapest reservation by which `job` ends in time, as early as the timeline allows; None if there is none.

    Short stages if some come first, then steps, then what follows them. The cheapest is the narrowest efficient degree
    that, taken as the most that the job may have at once, still brings it to its end in time: where fewer ranks are
    free, it makes do with those. Short stages of several degrees take part in the choice.
    """
    here = job.here
    from_s = max(job.ready_s, timeline.times[0])
    if not here.short:
        return _fit_steps(job, timeline, from_s)
    free = timeline.of_role(here.role)
    for degree, seconds, _ in here.before:
        start_s = free.earliest(seconds, from_s, degree)
        first = Piece(start_s, start_s + seconds, degree, role=here.role)
        rest = _fit_steps(job, timeline, first.end_s)
        if rest is not None:
            return [first, *rest]
    return None


def _fit_steps(job: PendingJob, timeline: Timeline, from_s: float) -> list[Piece] | None:
    """The part of the reservation from the steps on; no pieces where nothing is left."""
    here = job.here
    if not job.num_steps:
        return [] if from_s <= job.deadline_s + EPSILON_S else None
    free, free_after = timeline.of_role(here.steps_role), timeline.of_role(here.after_role)
    for degree, step_s, after in _ways(job):
        after_degree, after_s, _ = after
        steps_by_s = job.deadline_s - after_s
        if from_s + job.num_steps * step_s > steps_by_s + EPSILON_S:
            continue
        steps = step_pieces(free, job.speeds, job.num_steps, from_s, steps_by_s, degree)
        if not steps:
            continue
        if here.steps_role is not None:
            steps = [piece._replace(role=here.steps_role) for piece in steps]
        if not after_degree:
            return steps
        start_s = free_after.earliest(after_s, steps[-1].end_s, after_degree)
        if start_s + after_s <= job.deadline_s + EPSILON_S:
            return [*steps, Piece(start_s, start_s + after_s, after_degree, role=here.after_role)]
        if len(here.after) == 1:
            return None
    return None


def _ways(job: PendingJob) -> Iterable[tuple[int, float, EfficientDegree]]:
    """Efficient degrees with seconds per step, each with a pace of what follows the steps; least GPU time first."""
    efficient, after = job.speeds.efficient, job.here.after
    if len(after) < 2:
        pace = after[0] if after else _NOTHING
        return [(degree, step_s, pace) for degree, step_s, _ in efficient]
    ways = [
        (job.num_steps * gpu_s + pace[2], degree, step_s, pace) for degree, step_s, gpu_s in efficient for pace in after
    ]
    return [way[1:] for way in sorted(ways)]


def step_pieces(
    timeline: Timeline, speeds: Speeds, num_steps: int, from_s: float, by_s: float, max_degree: int
) -> list[Piece] | None:
    """`num_steps` steps between `from_s` and `by_s` on whatever is free, up to `max_degree` ranks; None if too late."""
    times, free, best = timeline.times, timeline.free, speeds.best
    num_segments = len(times)
    widest = best[max_degree][0]
    position = timeline.index_at(from_s)
    start_s = from_s
    by_s += EPSILON_S
    pieces: list[Piece] = []
    while start_s + num_steps * speeds.fastest_s <= by_s:
        degree, step_s = best[min(free[position], max_degree)]
        position += 1
        if degree == widest:
            while position < num_segments and free[position] >= max_degree:
                position += 1
        while position < num_segments and best[min(free[position], max_degree)][0] == degree:
            position += 1
        until_s = times[position] if position < num_segments else NEVER_S
        if degree:
            fitting = int((until_s - start_s + EPSILON_S) / step_s)
            if fitting >= num_steps:
                end_s = start_s + num_steps * step_s
                pieces.append(Piece(start_s, end_s, degree, num_steps))
                return pieces if end_s <= by_s else None
            if fitting:
                pieces.append(Piece(start_s, start_s + fitting * step_s, degree, fitting))
                num_steps -= fitting
        start_s = until_s
    return None
