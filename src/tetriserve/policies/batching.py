"""Requests that share a task: who may, and when it pays (TetriServe, section 5: selective batching)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tetriserve.core.cost import pays, times_per_step
from tetriserve.core.plan import CostModel, State
from tetriserve.core.request import Request
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.reservation import PendingJob, Speeds, bundle_of, speeds_of
from tetriserve.policies.timeline import EPSILON_S


def may_share(trajectories: Sequence[Trajectory]) -> bool:
    """Whether one task may be for all of them, once all are at the stage with steps."""
    first = trajectories[0].request.kind if trajectories else ()
    return all(not one.is_apart and one.request.kind == first for one in trajectories)


def sizes_that_pay(cost: CostModel, request: Request, degree: int) -> list[tuple[int, float]]:
    """Batches of the kind of `request` with their step times, from 1 up to the one with the least time for each member;
    all of them pay."""
    alone_s = times_per_step(cost, request)[degree]
    found = [(1, alone_s)]
    for batch in range(2, cost.max_batch + 1):
        step_s = times_per_step(cost, request, batch).get(degree)
        if step_s is None or not pays(step_s, batch, alone_s) or step_s / batch > found[-1][1] / (batch - 1):
            break
        found.append((batch, step_s))
    return found


class Sharing:
    """What batches of each kind of job do on the pool, at one event."""

    def __init__(self, state: State, now: float, task_s: float) -> None:
        self._state = state
        self._now = now
        self._task_s = task_s
        self._speeds: dict[int, list[Speeds]] = {}

    def speeds(self, job: PendingJob) -> list[Speeds]:
        """Of the batches that pay, from 1 up."""
        kind = id(job.ahead)  # one object for all jobs of a kind
        found = self._speeds.get(kind)
        if found is None:
            found = self._speeds[kind] = [job.speeds]
            cost, request = self._state.cost, job.trajectory.request
            num_ranks = self._state.num_ranks_for(request, request.stepped)
            for batch, _ in sizes_that_pay(cost, request, min(job.speeds.times))[1:]:
                times = tuple(times_per_step(cost, request, batch).items())
                speeds = speeds_of(times, num_ranks, cost.switch_s, self._task_s)
                if speeds is not None:
                    found.append(speeds)
        return found

    def bundles(self, jobs: Iterable[PendingJob]) -> list[PendingJob]:
        """`jobs`, those of a kind in bundles as large as all their members' deadlines allow.

        Who waits may wait a moment longer for partners that run: tasks are short.
        """
        bundled: list[PendingJob] = []
        groups: dict[tuple[int, int], list[PendingJob]] = {}
        for job in jobs:
            if not job.num_steps or job.trajectory.is_apart or len(self.speeds(job)) == 1:
                bundled.append(job)
                continue
            groups.setdefault((id(job.ahead), job.priority), []).append(job)
        for group in groups.values():
            group.sort(key=lambda job: job.deadline_s)
            while group:
                count = self._most_together(group)
                bundled.append(self.bundle(group[:count]))
                del group[:count]
        return bundled

    def bundle(self, jobs: Sequence[PendingJob]) -> PendingJob:
        return bundle_of(jobs, self.speeds(jobs[0])[len(jobs) - 1], self._now) if len(jobs) > 1 else jobs[0]

    def _most_together(self, jobs: Sequence[PendingJob]) -> int:
        """How many of `jobs`, by deadline, could end in time if they shared all their tasks from now on."""
        speeds = self.speeds(jobs[0])
        for count in range(min(len(jobs), len(speeds)), 1, -1):
            members, step_s = jobs[:count], speeds[count - 1].fastest_s
            rest_s = sum([job.here.rest_s for job in members])
            from_s = max(self._now, *[job.ready_s for job in members]) + rest_s - EPSILON_S
            if all(from_s + job.num_steps * step_s <= job.deadline_s for job in members):
                return count
        return 1
