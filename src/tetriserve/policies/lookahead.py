"""Reservations in a timeline of future capacity, renewed at every event, instead of rounds."""

from __future__ import annotations

from collections.abc import Sequence

from tetriserve.core.plan import Plan, State, Task
from tetriserve.core.trajectory import Stage, Trajectory
from tetriserve.policies.placement import place
from tetriserve.policies.reservation import Job, JobBook, expected_end_s, num_reserved, reserve
from tetriserve.policies.stages import place_short_stages
from tetriserve.policies.timeline import EPSILON_S, Piece, Timeline

TASK_S = 0.25
"""Length of a denoise task with a reservation: how long an urgent arrival may have to wait for its ranks."""

FILL_TASK_S = 0.12
"""Length of a denoise task without one, unless a single step takes longer."""

FILL_STEP_S = 0.25
"""Longest step of such a task; for a shape whose fastest step takes more than half of it, twice that step."""

GRACE_S = 0.002
"""How long after a reservation should have begun the policy asks to be asked again: the event that frees its ranks
normally comes first, and this is for when it does not."""


RESOLUTION = 0.03
"""How coarse the timeline of a large pool is, as a fraction of how far ahead it looks."""

EXACT_RANKS = 16
"""Up to this many ranks the timeline is exact."""


class Lookahead:
    """Reserves future ranks for every request that can end in time, and lets nothing else stand in their way.

    At every event: (a) the ranks of tasks in flight count as free from their predicted ends on; (b) requests reserve
    the cheapest way to their deadlines in that timeline (`reservation.reserve`), and those whose reservations begin
    now start; (c) these widen where ranks are left; (d) all others, requests that are late or that did not fit, fill
    what is still left, in short tasks. Widening and filling use only ranks that are free until the task ends, so that
    no reservation is ever delayed (conservative backfilling). Nothing is kept: the next event reserves anew, with tasks
    so short that changing the plan is cheap.
    """

    def __init__(self, *, task_s: float = TASK_S, promote: bool = True, widen: bool = True) -> None:
        """
        Args:
            task_s: length of a denoise task, in seconds.
            promote: try again with those ahead that did not fit.
            widen: give tasks ranks that would idle.
        """
        self.task_s = task_s
        self.promote = promote
        self.widen = widen
        self._book = JobBook(task_s)

    def plan(self, state: State, now: float) -> Plan:
        """See `Policy.plan`. Asks again if what the next reservation waits for is overdue."""
        if not state.waiting or not state.idle_ranks:
            return Plan()
        jobs = self._book.jobs(state, now)
        timeline = Timeline.of(
            now,
            len(state.idle_ranks),
            [(expected_end_s(flight, now), flight.task.degree) for flight in state.in_flight],
            resolution=RESOLUTION if len(state.ranks) > EXACT_RANKS else 0.0,
        )
        in_time = [job for job in jobs if job.latest_s >= now - EPSILON_S]
        reservations = reserve(in_time, timeline, num_reserved(len(state.ranks)), promote=self.promote)
        widest = max((len(job.speeds.best) - 1 for job in jobs), default=1)
        start = _Start(now, state.cost.switch_s, widest, reservations.timeline)
        begins_s = []
        for job, pieces in reservations.kept:
            if not job.is_waiting:
                continue
            if pieces[0].start_s > now + EPSILON_S:
                begins_s.append(pieces[0].start_s)
            elif pieces[0].num_steps:
                start.denoise(job, pieces[0], self.task_s, widen=self.widen)
            else:
                start.short.append(job.trajectory)
        start.fill(
            [job for job in reservations.failed if job.is_waiting],
            [job for job in jobs if job.is_waiting and job.latest_s < now - EPSILON_S],
        )
        return Plan(start.tasks(state), wake_at=min(begins_s) + GRACE_S if begins_s else None)


class _Start:
    """What starts now. `timeline` is what the reservations leave free; `widest` the largest degree of any task."""

    def __init__(self, now: float, switch_s: float, widest: int, timeline: Timeline) -> None:
        self.now = now
        self.timeline = timeline
        self.short: list[Trajectory] = []
        self._ready_s = now + switch_s - EPSILON_S
        self._widest = widest
        self._free_until = timeline.free_until(widest)
        self._wanted: list[tuple[Trajectory, int]] = []
        self._num_steps: list[int] = []

    def denoise(self, job: Job, piece: Piece, task_s: float, *, widen: bool) -> None:
        """Start `piece`, or its first `task_s`, at the fastest degree that ranks left over allow.

        All wider degrees are considered, as in `scale_up`.
        """
        times = job.speeds.times
        degree, num_steps = piece.degree, min(piece.num_steps, _steps_in(task_s, times[piece.degree]))
        if widen:
            for wider, step_s in times.items():
                if wider > piece.degree and step_s < times[degree]:
                    hole_s = min(self._free_until[wider - piece.degree], piece.end_s) - self._ready_s
                    fitting = min(job.num_steps, int(hole_s / step_s), _steps_in(task_s, step_s))
                    if fitting > 0:
                        degree, num_steps = wider, fitting
            if degree > piece.degree:
                self._claim(num_steps * times[degree], degree - piece.degree)
        self._wanted.append((job.trajectory, degree))
        self._num_steps.append(num_steps)

    def fill(self, failed: Sequence[Job], late: Sequence[Job]) -> None:
        """Short tasks of requests without a reservation: first those that could still be in time, as they may yet fit.

        Least GPU time first, within a priority class: of the late ones this makes the mean latency shortest.
        """
        hopeless: set[int] = set()
        for jobs in (failed, late):
            if self._free_until[1] <= self._ready_s:
                return
            for job in sorted(jobs, key=lambda job: (job.priority, job.gpu_s)):
                if self._free_until[1] <= self._ready_s:
                    return
                if job.stage is not Stage.DENOISE:
                    duration_s = job.encode_s or job.decode_s
                    if self.now + duration_s <= self._free_until[1] + EPSILON_S:
                        self._claim_until(self.now + duration_s, 1)
                        self.short.append(job.trajectory)
                elif id(job.speeds) not in hopeless and not self._fill_denoise(job):
                    hopeless.add(id(job.speeds))

    def _fill_denoise(self, job: Job) -> bool:
        """Start a task at the narrowest degree whose step is short enough; failing that at the fastest that fits."""
        times = job.speeds.times
        longest_s = max(FILL_STEP_S, 2 * job.speeds.fastest_s)
        degree = num_steps = 0
        for wider, step_s in times.items():
            hole_s = self._free_until[wider] - self._ready_s
            if step_s > min(hole_s, longest_s) or (degree and step_s >= times[degree]):
                continue
            degree, num_steps = wider, min(job.num_steps, int(hole_s / step_s), _steps_in(FILL_TASK_S, step_s))
            if step_s <= FILL_TASK_S:
                break
        if degree:
            self._claim(num_steps * times[degree], degree)
            self._wanted.append((job.trajectory, degree))
            self._num_steps.append(num_steps)
        return degree > 0

    def tasks(self, state: State) -> tuple[Task, ...]:
        """Everything started, on ranks."""
        free = set(state.idle_ranks)
        tasks = []
        placed = place(self._wanted, free)
        for (trajectory, _), num_steps, ranks in zip(self._wanted, self._num_steps, placed, strict=True):
            tasks.append(Task(trajectory.request_id, Stage.DENOISE, ranks, num_steps))
            free.difference_update(ranks)
        return (*tasks, *place_short_stages(self.short, free))

    def _claim(self, duration_s: float, num_ranks: int) -> None:
        self._claim_until(self._ready_s + duration_s, num_ranks)

    def _claim_until(self, end_s: float, num_ranks: int) -> None:
        self.timeline.claim([Piece(self.now, end_s, num_ranks)])
        self._free_until = self.timeline.free_until(self._widest)


def _steps_in(task_s: float, step_s: float) -> int:
    return max(1, int(task_s / step_s))
