"""What will become of what is there: the present state run on into the future, by the controller and policy that serve.

The controller is forked and goes on in virtual time from the middle of its life: tasks in flight end when they are
expected to, every task takes what the cost model says, and no more requests arrive.

**Resolution.** An exact forecast costs a decision per task, and under a long queue there are thousands. With a
resolution r above 0 the future is looked at the more coarsely the further away it is: a task with steps that starts t
seconds ahead lasts at least r * t, and tasks that end within r * t / 5 of each other are followed by one decision,
though each of them ends, and its ranks go on, at its own time. A short first stage is part of the first task with
steps, and a short last stage follows the last step at once, without a decision. So the number of decisions grows with
the logarithm of the time that is forecast, and what comes next is nearly exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tetriserve.control.controller import Controller
from tetriserve.control.virtual_pool import VirtualPool
from tetriserve.core.cost import task_s, times_per_step
from tetriserve.core.events import (
    Event,
    FailureKind,
    FinishRequest,
    Result,
    Run,
    StartTask,
    Submitted,
    TaskFailed,
    TaskFinished,
    TensorRef,
    TimerFired,
)
from tetriserve.core.forecast import Forecast
from tetriserve.core.plan import Plan, State, Task
from tetriserve.core.request import Request
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.policy import Policy
from tetriserve.policies.reservation import expected_end_s

_MOMENTS = 5
"""Moments that the shortest task of a resolution is divided into."""
_NOTHING = TensorRef("forecast", 0)


def forecast(
    controller: Controller,
    now: float,
    policy: Policy,
    *,
    more: Sequence[Request] = (),
    until_s: float = math.inf,
    awaited: Mapping[str, float] | None = None,
    resolution: float = 0.0,
) -> Forecast:
    """What `controller` would do from `now` on if nobody else came and all went as expected.

    Args:
        controller: left as it is; it may be in the middle of serving.
        policy: of the same kind as the controller's; a fresh instance, as policies keep facts about trajectories.
        more: requests that arrive at `now`, one after the other.
        until_s: how far to look; tasks that start later are left out.
        awaited: stop once each of these requests has ended, or its time (seconds since the engine started) has passed.
        resolution: 0 for the exact course, else see the module.

    Raises:
        PolicyError: the policy planned what cannot be.
    """
    return _WhatIf(controller, now, policy, resolution).run(more, until_s, awaited)


class _WhatIf:
    """One run of a fork.

    ready_s: when each request's last task ends, by id. free_s: when each rank's does. first_s: what a short first stage
    adds to a request's first task with steps, by id.
    """

    def __init__(self, controller: Controller, now: float, policy: Policy, resolution: float) -> None:
        self.controller = controller.fork(_Coarse(policy, now, resolution) if resolution else policy)
        self.first_s = self.controller.skip_first_stages() if resolution else {}
        self.start_s = now
        self.pool = VirtualPool(
            self.controller, now, start=self._start, finish=self._finish, blur=resolution / _MOMENTS
        )
        self.runs: list[Run] = []
        self.ready_s: dict[str, float] = {}
        self.free_s: dict[int, float] = {}
        self.finish_s: dict[str, float] = {}
        self._take_over_tasks()

    def run(self, more: Sequence[Request], until_s: float, awaited: Mapping[str, float] | None) -> Forecast:
        self.pool.handle(TimerFired())
        for request in more:
            self.pool.handle(Submitted(request))
        while awaited is None or self._is_any_open(awaited):
            was_at_rest = self.pool.is_at_rest
            if not self.pool.advance(until_s):
                break
            if was_at_rest and self.pool.is_at_rest:
                break  # the policy only asks to be asked again: without a rank it would do so for ever
        runs = sorted(self.runs, key=lambda run: run.start_s)
        return Forecast(now=self.start_s, runs=tuple(runs), finish_s=self.finish_s)

    def _take_over_tasks(self) -> None:
        state = self.controller.state
        trajectories = {trajectory.request_id: trajectory for trajectory in state.trajectories}
        for flight in state.in_flight:
            task = flight.task
            members = [trajectories.get(request_id) for request_id in task.members]
            end: Event = TaskFailed(flight.task_id, FailureKind.LOST, "all of its members were cancelled")
            if any(members):
                end = self._end_of(flight.task_id, task, members)
            end_s = expected_end_s(flight, self.start_s)
            self._note(Run(task, flight.start_s, end_s))
            self.pool.expect(end_s, end)

    def _start(self, start: StartTask) -> tuple[float, Event]:
        task, now = start.task, self.pool.now
        # Within a moment a rank or a request may be in use for a little longer.
        start_s = max(now, *map(self._ready_s, task.members), *map(self._free_s, task.ranks))
        takes_s = self.controller.end_s(start.task_id) - now
        takes_s += sum([self.first_s.pop(request_id, 0.0) for request_id in task.members])
        self._note(Run(task, start_s, start_s + takes_s))
        elapsed_s = task_s(self.controller.cost, task, start.work[0].request)
        return start_s + takes_s, TaskFinished.planned(start, elapsed_s, _NOTHING)

    def _finish(self, command: FinishRequest) -> None:
        request_id = command.request.request_id
        self.finish_s[request_id] = self.ready_s[request_id]

    def _end_of(self, task_id: int, task: Task, members: Sequence[Trajectory | None]) -> Event:
        """`members`: None for one that was cancelled; there is another."""
        results = [
            Result(_NOTHING, 0, is_stage_over=False)
            if one is None
            else Result.planned(task, one.stage, one.stage_steps_done, _NOTHING)
            for one in members
        ]
        request = next(one.request for one in members if one is not None)
        return TaskFinished(task_id, task_s(self.controller.cost, task, request), tuple(results))

    def _note(self, run: Run) -> None:
        self.runs.append(run)
        self.ready_s.update(dict.fromkeys(run.task.members, run.end_s))
        self.free_s.update(dict.fromkeys(run.task.ranks, run.end_s))

    def _ready_s(self, request_id: str) -> float:
        return self.ready_s.get(request_id, 0.0)

    def _free_s(self, rank: int) -> float:
        return self.free_s.get(rank, 0.0)

    def _is_any_open(self, awaited: Mapping[str, float]) -> bool:
        return any(self.pool.now <= time_s and name not in self.finish_s for name, time_s in awaited.items())


class _Coarse:
    """`policy` with tasks of steps that last at least `resolution` of the time that lies ahead of `start_s`."""

    def __init__(self, policy: Policy, start_s: float, resolution: float) -> None:
        self._policy = policy
        self._start_s = start_s
        self._resolution = resolution

    def plan(self, state: State, now: float) -> Plan:
        least_s = self._resolution * (now - self._start_s)
        closing = _closing(state, now) if least_s else ()
        if closing and sum(task.degree for task in closing) == len(state.idle_ranks):
            return Plan(closing)  # nothing is left to decide on
        plan = self._policy.plan(state, now)
        if not plan.tasks or not least_s:
            return plan
        waiting = {trajectory.request_id: trajectory for trajectory in state.waiting}
        tasks = tuple(_lengthened(task, waiting, state, least_s) for task in plan.tasks)
        return Plan(tasks, plan.wake_at)


def _closing(state: State, now: float) -> tuple[Task, ...]:
    """The tasks of requests that wait for their last stage, a short one, each on its idle leader, and on as many others
    of the ranks that hold its state as it needs to be in time."""
    idle = set(state.idle_ranks)
    tasks = []
    for trajectory in state.waiting:
        leader = next(iter(trajectory.holders), None)
        is_last = trajectory.stage_index == len(trajectory.request.stages) - 1
        if is_last and trajectory.is_short and leader in idle:
            request, stage = trajectory.request, trajectory.stage
            near = state.stage_ranks.among(request.model, stage.kind, [r for r in trajectory.holders if r in idle])
            times, budget_s = state.cost.times(request, stage), request.deadline_s - now - state.cost.switch_s
            degree = next((k for k in times if k <= len(near) and times[k] <= budget_s), min(times))
            if near[:1] == (leader,) and degree <= len(near):
                idle.difference_update(near[:degree])
                tasks.append(Task((trajectory.request_id,), stage.kind, tuple(sorted(near[:degree]))))
    return tuple(tasks)


def _lengthened(task: Task, waiting: Mapping[str, Trajectory], state: State, least_s: float) -> Task:
    if not (task.num_steps and task.members and waiting.keys() >= set(task.members)):
        return task
    members = [waiting[request_id] for request_id in task.members]
    step_s = times_per_step(state.cost, members[0].request).get(task.degree, math.inf)
    most = min([trajectory.remaining_steps for trajectory in members])
    return replace(task, num_steps=min(max(task.num_steps, math.ceil(least_s / step_s)), most))
