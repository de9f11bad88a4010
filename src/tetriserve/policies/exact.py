"""Exact search over schedules, by branch and bound (the exhaustive search of TetriServe, table 6).

**What is searched.** All schedules of all tasks that are left: short stages at any degree, steps in runs of any length
at any degree, every task charged with its start as the simulator does. Tasks in flight end when predicted,
or now if that is past; nothing more arrives; ranks are alike, and priority classes count alike. The best schedule
attains the most deadlines and, of those that do, has the least sum of finish times over all requests, late ones too.

Where only some ranks may run a stage (`State.stage_ranks`) a request waits for the first of them that is free; from
then on the search takes any rank to do, so that its schedule may be better than one that there is.

A task of another degree than its request's last one costs a move. One of the same degree is taken to find its ranks
free, which placement tries to bring about; where it does not, the schedule takes a move longer than was searched. With
moves that cost nothing, nothing is taken for granted.

**Why sequences are enough.** Take any schedule, order its tasks by their starts, and start each one, in this order, as
early as three things allow: the end of its request's task before, enough free ranks, the start of the task before it in
the order. No task starts later than it did, by induction: at its old start the same tasks have gone before it, and what
had ended of them has ended now, so its ranks are free. So no request finishes later, and some best schedule can be made
in this way from a sequence of (request, degree, number of steps). In such a schedule tasks start now or when a task
ends, which is when a policy is asked.

**What is cut, without loss.**

- Degrees that are no faster than a narrower one: the narrower one would end no later on fewer ranks.
- Partial schedules that cannot beat the best known one even if every request went on undisturbed at its fastest as soon
  as it may and a rank is free. Of runs at one degree that do not finish the steps, a longer one only makes this worse:
  all are cut with the first.
- Of two partial schedules that have brought all requests equally far and left them at the same degrees, the one that is
  nowhere better: in attained deadlines and finish times so far, in when each request may go on, in when the first,
  second, ... rank is free.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from tetriserve.core.plan import InFlight, State
from tetriserve.core.request import Request, Stage
from tetriserve.core.trajectory import Trajectory

_TOLERANCE_S = 1e-9


_Position: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""By job: progress, and degree of the last task."""


class Start(NamedTuple):
    """A task that begins now; `num_steps` is 0 for a short stage."""

    request_id: str
    degree: int
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BestSchedule:
    """What a search found.

    starts: the tasks that begin now, in the schedule's order. Some may have to wait a moment for a task in flight that
        is predicted to end now.
    num_attained, total_finish_s: requests that finish in time, and the sum of all finish times; a request whose last
        task is in flight counts in neither.
    num_nodes: partial schedules that the search made.
    is_exact: no schedule is better by more than a nanosecond; False when the search was stopped.
    """

    starts: tuple[Start, ...]
    num_attained: int
    total_finish_s: float
    num_nodes: int
    is_exact: bool


def find_best_schedule(state: State, now: float, *, max_nodes: int) -> BestSchedule:
    """Search the schedules of everything unfinished in `state` that can run on its ranks, from `now` on.

    The partial schedule with the best bound is extended next, until none is left that could beat the best complete one,
    or for `max_nodes`.
    """
    jobs = _jobs(state, now)
    root = _root(jobs, state, now)
    best = _first_schedule(root, jobs, now)
    num_nodes, is_exact = 0, True
    open_partials = [(root.key, 0, root)]
    kept: dict[_Position, list[_Partial]] = {}
    while open_partials and is_exact:
        _, _, partial = heapq.heappop(open_partials)
        if partial.is_dominated or not partial.can_beat(best):
            continue
        for extended in _extensions(partial, jobs, best, now):
            num_nodes += 1
            if num_nodes > max_nodes:
                is_exact = False
                break
            if not extended.can_beat(best) or not _keep(extended, kept.setdefault(extended.position, [])):
                continue
            if extended.is_complete:
                best = extended
            else:
                heapq.heappush(open_partials, (extended.key, num_nodes, extended))
    return BestSchedule(
        starts=best.starts,
        num_attained=best.num_attained,
        total_finish_s=best.total_finish_s,
        num_nodes=min(num_nodes, max_nodes),
        is_exact=is_exact,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """A request's work. Progress counts 1 for each short stage and 1 for each step.

    degree: of the last task; 0 before the first, which nothing can move.
    steps_left: by progress, of the present stage; 0 at a short one.
    times: by progress, seconds by degree of a step or of a short stage, fastest first.
    step_times: of a step.
    left_s: by progress, seconds to the end with one run of all steps left, each stage at its fastest degree.
    """

    request: Request
    progress: int
    degree: int
    ready_s: float
    switch_s: float
    move_s: float
    steps_left: tuple[int, ...]
    times: tuple[Mapping[int, float], ...]
    step_times: Mapping[int, float]
    left_s: tuple[float, ...]

    def is_done(self, progress: int) -> bool:
        return progress == len(self.steps_left)

    def degrees_at(self, progress: int) -> tuple[int, ...]:
        """What the next task may run at, fastest first."""
        return tuple(self.times[progress])

    def start_s(self, last_degree: int, degree: int) -> float:
        """Seconds that a task takes to start."""
        return self.switch_s + (self.move_s if last_degree not in (0, degree) else 0.0)

    def work_s(self, progress: int, degree: int, num_steps: int) -> float:
        """Seconds of the next task after its start."""
        return max(1, num_steps) * self.times[progress][degree]


@dataclass(slots=True, eq=False)
class _Partial:
    """A sequence of tasks, each started as early as the sequence allows; the next starts no earlier than the last.

    progress, degrees, ready_s: by job, how far it is, at what degree it ran last, and when it may go on.
    free_s: when the first, second, ... rank is free, ascending.
    num_attainable, least_total_s: what no completion can exceed, or fall below.
    """

    progress: tuple[int, ...]
    degrees: tuple[int, ...]
    ready_s: tuple[float, ...]
    free_s: tuple[float, ...]
    starts: tuple[Start, ...]
    num_attained: int
    total_finish_s: float
    num_attainable: int
    least_total_s: float
    is_complete: bool
    is_dominated: bool = False

    @property
    def position(self) -> _Position:
        return self.progress, self.degrees

    @property
    def key(self) -> tuple[int, float]:
        """The best bound sorts first."""
        return -self.num_attainable, self.least_total_s

    def can_beat(self, best: _Partial) -> bool:
        if self.num_attainable != best.num_attained:
            return self.num_attainable > best.num_attained
        return self.least_total_s < best.total_finish_s - _TOLERANCE_S

    def dominates(self, other: _Partial) -> bool:
        """Whether whatever completes `other` completes this one no worse; their positions must be equal."""
        return (
            (-self.num_attained, self.total_finish_s) <= (-other.num_attained, other.total_finish_s)
            and all(own <= its for own, its in zip(self.ready_s, other.ready_s, strict=True))
            and all(own <= its for own, its in zip(self.free_s, other.free_s, strict=True))
        )


def _jobs(state: State, now: float) -> tuple[_Job, ...]:
    """The requests with tasks left that some degree can serve on the living ranks; by deadline, the lost ones last."""
    found = [
        _job(trajectory, state.flights.get(trajectory.request_id), state, now) for trajectory in state.trajectories
    ]
    jobs = [job for job in found if job is not None and not job.is_done(job.progress)]

    def urgency(job: _Job) -> tuple[bool, float, float, str]:
        request = job.request
        is_lost = job.ready_s + job.left_s[job.progress] > request.deadline_s
        return is_lost, request.deadline_s, request.arrival_s, request.request_id

    return tuple(sorted(jobs, key=urgency))


def _job(trajectory: Trajectory, flight: InFlight | None, state: State, now: float) -> _Job | None:
    request, cost = trajectory.request, state.cost
    stages = [(stage, _useful(request, stage, state)) for stage in request.stages]
    step_times = _useful(request, request.stepped, state)
    first_free_s = now if flight is not None else _first_free_s(trajectory, state, now)
    if not step_times or first_free_s is None:
        return None
    passed = request.stages[: trajectory.stage_index]
    progress = sum(max(1, stage.num_steps) for stage in passed) + trajectory.stage_steps_done
    if flight is not None:
        progress += flight.task.num_steps or 1
    return _Job(
        request=request,
        progress=progress,
        degree=len(trajectory.holders) if flight is None else flight.task.degree,
        ready_s=first_free_s if flight is None else max(now, flight.end_s),
        switch_s=cost.switch_s,
        move_s=cost.move_s,
        steps_left=tuple(
            left for stage in request.stages for left in (range(stage.num_steps, 0, -1) if stage.num_steps else (0,))
        ),
        times=tuple(times for stage, times in stages for _ in range(max(1, stage.num_steps))),
        step_times=step_times,
        left_s=_left_s(stages, cost.switch_s),
    )


def _useful(request: Request, stage: Stage, state: State) -> Mapping[int, float]:
    """Seconds by degree, fastest first, of those degrees that living ranks allow and that no narrower one equals. Of a
    short stage at least the narrowest."""
    times, num_ranks = state.cost.times(request, stage), state.num_ranks_for(request, stage)
    fitting = [degree for degree in times if degree <= num_ranks or (degree == min(times) and not stage.num_steps)]
    useful = [degree for degree in fitting if all(times[degree] < times[less] for less in fitting if less < degree)]
    return {degree: times[degree] for degree in sorted(useful, key=times.__getitem__)}


def _first_free_s(trajectory: Trajectory, state: State, now: float) -> float | None:
    """When the first rank that may run the stage that it is at is free; None where none lives."""
    if not state.stage_ranks:
        return now
    ends_s = {rank: max(now, flight.end_s) for flight in state.in_flight for rank in flight.task.ranks}
    allowed = state.stage_ranks.among(trajectory.request.model, trajectory.stage.kind, state.ranks)
    return min((ends_s.get(rank, now) for rank in allowed), default=None)


def _left_s(stages: Sequence[tuple[Stage, Mapping[int, float]]], switch_s: float) -> tuple[float, ...]:
    left_s = [0.0]  # from the end
    for stage, times in reversed(stages):
        after_s, fastest_s = left_s[-1], next(iter(times.values()))
        left_s += [switch_s + left * fastest_s + after_s for left in range(1, max(1, stage.num_steps) + 1)]
    return tuple(reversed(left_s))


def _root(jobs: Sequence[_Job], state: State, now: float) -> _Partial:
    """Nothing planned yet."""
    busy_until_s = {rank: max(now, flight.end_s) for flight in state.in_flight for rank in flight.task.ranks}
    return _Partial(
        progress=tuple(job.progress for job in jobs),
        degrees=tuple(job.degree for job in jobs),
        ready_s=tuple(job.ready_s for job in jobs),
        free_s=tuple(sorted(busy_until_s.get(rank, now) for rank in state.ranks)),
        starts=(),
        num_attained=0,
        total_finish_s=0.0,
        num_attainable=len(jobs),
        least_total_s=0.0,
        is_complete=not jobs,
    )


def _first_schedule(root: _Partial, jobs: Sequence[_Job], now: float) -> _Partial:
    """The best of a few: one request after the other, each at its fastest, and side by side at each degree at most."""
    widths = sorted({degree for job in jobs for degree in job.step_times}, reverse=True)
    schedules = [_in_turn(root, jobs, now), *(_side_by_side(root, jobs, width, now) for width in widths)]
    return max(schedules, key=lambda schedule: (schedule.num_attained, -schedule.total_finish_s))


def _in_turn(root: _Partial, jobs: Sequence[_Job], now: float) -> _Partial:
    """A request after the other in their order, each at its fastest; short stages overlap where ranks are free."""
    partial = root
    for index, job in enumerate(jobs):
        while not job.is_done(progress := partial.progress[index]):
            partial = _extend(partial, jobs, index, job.degrees_at(progress)[0], job.steps_left[progress], now)
    return partial


def _side_by_side(root: _Partial, jobs: Sequence[_Job], width: int, now: float) -> _Partial:
    """Whichever request can go on first does, on at most `width` ranks; the earlier in their order of equals."""
    partial = root
    while not partial.is_complete:
        options = []
        for index, (job, progress) in enumerate(zip(jobs, partial.progress, strict=True)):
            if not job.is_done(progress):
                degrees = job.degrees_at(progress)
                degree = next((degree for degree in degrees if degree <= width), degrees[-1])
                options.append((max(partial.ready_s[index], partial.free_s[degree - 1]), index, degree))
        _, index, degree = min(options)
        partial = _extend(partial, jobs, index, degree, jobs[index].steps_left[partial.progress[index]], now)
    return partial


def _extensions(partial: _Partial, jobs: Sequence[_Job], best: _Partial, now: float) -> Iterator[_Partial]:
    """`partial` with one task more, for every next task that may lead to something better than `best`."""
    for index, (job, progress) in enumerate(zip(jobs, partial.progress, strict=True)):
        if job.is_done(progress):
            continue
        steps_left = job.steps_left[progress]
        for degree in job.degrees_at(progress):
            yield _extend(partial, jobs, index, degree, steps_left, now)
            for num_steps in range(1, steps_left):
                extended = _extend(partial, jobs, index, degree, num_steps, now)
                yield extended
                if not extended.can_beat(best):
                    break


def _extend(partial: _Partial, jobs: Sequence[_Job], index: int, degree: int, num_steps: int, now: float) -> _Partial:
    """`partial` with a task of job `index` started as early as may be; `num_steps` is 0 for a short stage."""
    job, progress = jobs[index], partial.progress[index]
    start_s = max(partial.ready_s[index], partial.free_s[degree - 1])
    end_s = start_s + job.start_s(partial.degrees[index], degree) + job.work_s(progress, degree, num_steps)
    free_s = sorted([end_s] * degree + [max(start_s, free_s) for free_s in partial.free_s[degree:]])
    progresses = (*partial.progress[:index], progress + (num_steps or 1), *partial.progress[index + 1 :])
    num_attained, total_finish_s = partial.num_attained, partial.total_finish_s
    if job.is_done(progresses[index]):
        num_attained += end_s <= job.request.deadline_s
        total_finish_s += end_s
    num_attainable, least_total_s = num_attained, total_finish_s
    ready_s = []
    for other_index, (other, reached) in enumerate(zip(jobs, progresses, strict=True)):
        if other.is_done(reached):
            ready_s.append(0.0)
            continue
        ready_s.append(max(free_s[0], end_s if other_index == index else partial.ready_s[other_index]))
        finish_s = ready_s[-1] + other.left_s[reached]
        num_attainable += finish_s <= other.request.deadline_s + _TOLERANCE_S
        least_total_s += finish_s
    return _Partial(
        progress=progresses,
        degrees=(*partial.degrees[:index], degree, *partial.degrees[index + 1 :]),
        ready_s=tuple(ready_s),
        free_s=tuple(free_s),
        starts=(*partial.starts, Start(job.request.request_id, degree, num_steps))
        if start_s == now
        else partial.starts,
        num_attained=num_attained,
        total_finish_s=total_finish_s,
        num_attainable=num_attainable,
        least_total_s=least_total_s,
        is_complete=all(other.is_done(reached) for other, reached in zip(jobs, progresses, strict=True)),
    )


def _keep(partial: _Partial, kept: list[_Partial]) -> bool:
    """Add `partial` to those of equal progress unless one dominates it; those that it dominates go."""
    if any(other.dominates(partial) for other in kept):
        return False
    for other in kept:
        other.is_dominated = partial.dominates(other)
    kept[:] = [other for other in kept if not other.is_dominated]
    kept.append(partial)
    return True
