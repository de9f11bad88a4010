"""What will become of what is there: the present state run on into the future, by the controller and policy that serve.

A forecast is a simulation that starts in mid-life. The controller is forked, tasks in flight end when they are expected
to, every task takes what the cost model says, and nobody else arrives.

**Resolution.** An exact forecast costs a decision per task, and under a long queue there are thousands. With a
resolution r above 0 the future is looked at the more coarsely the further away it is: a task with steps that starts t
seconds ahead lasts at least r * t, and tasks that end within r * t / 5 of each other are followed by one decision,
though each of them ends, and its ranks go on, at its own time. A short first stage is part of the first task with
steps, and a short last stage follows the last step at once, without a decision. So the number of decisions grows with
the logarithm of the time that is forecast, and what comes next is nearly exact.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tetriserve.control.controller import Controller
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
    WakeAt,
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
    """One run of a fork. `ends` holds how and when each task in flight ends; of equal times the first started first.

    ready_s: when each request's last task ends, by id. free_s: when each rank's does. first_s: what a short first stage
    adds to a request's first task with steps, by id.
    """

    def __init__(self, controller: Controller, now: float, policy: Policy, resolution: float) -> None:
        self.controller = controller.fork(_Coarse(policy, now, resolution) if resolution else policy)
        self.first_s = self.controller.skip_first_stages() if resolution else {}
        self.start_s = self.now = now
        self.blur = resolution / _MOMENTS
        self.ends: list[tuple[float, int, Event]] = []
        self.timer_s = math.inf
        self.runs: list[Run] = []
        self.ready_s: dict[str, float] = {}
        self.free_s: dict[int, float] = {}
        self.finish_s: dict[str, float] = {}
        self._take_over_tasks()

    def run(self, more: Sequence[Request], until_s: float, awaited: Mapping[str, float] | None) -> Forecast:
        self._handle([TimerFired()])
        for request in more:
            self._handle([Submitted(request)])
        while (time_s := self._next_s) <= until_s and time_s < math.inf:
            if awaited is not None and not self._is_any_open(awaited):
                break
            self.now = max(self.now, time_s)
            if self.timer_s <= self.now:
                self.timer_s = math.inf
            was_at_rest = not self.ends
            self._handle(self._landing() or [TimerFired()])
            if was_at_rest and not self.ends:
                break  # the policy only asks to be asked again: without a rank it would do so for ever
        runs = sorted(self.runs, key=lambda run: run.start_s)
        return Forecast(now=self.start_s, runs=tuple(runs), finish_s=self.finish_s)

    def _take_over_tasks(self) -> None:
        state = self.controller.state
        trajectories = {trajectory.request_id: trajectory for trajectory in state.trajectories}
        for flight in state.in_flight:
            task = flight.task
            members = [trajectories[request_id] for request_id in task.members if request_id in trajectories]
            end: Event = TaskFailed(flight.task_id, FailureKind.LOST, "cancelled")
            if len(members) == len(task.members):
                end = self._end_of(flight.task_id, task, members)
            self._expect(Run(flight.task, flight.start_s, expected_end_s(flight, self.now)), flight.task_id, end)

    def _handle(self, events: Sequence[Event]) -> None:
        for command in self.controller.handle_all(events, self.now):
            match command:
                case StartTask(task_id, task, work):
                    # Within a moment a rank or a request may be in use for a little longer.
                    start_s = max(self.now, *map(self._ready_s, task.members), *map(self._free_s, task.ranks))
                    takes_s = self.controller.end_s(task_id) - self.now
                    takes_s += sum([self.first_s.pop(request_id, 0.0) for request_id in task.members])
                    end = self._end_of(task_id, task, [part.trajectory for part in work])
                    self._expect(Run(task, start_s, start_s + takes_s), task_id, end)
                case WakeAt(time_s):
                    self.timer_s = max(time_s, self.now)
                case FinishRequest(request):
                    self.finish_s[request.request_id] = self.ready_s[request.request_id]
                case _:
                    pass  # nobody waits for an answer, and there is no state to drop

    def _end_of(self, task_id: int, task: Task, members: Sequence[Trajectory]) -> Event:
        results = [Result.planned(task, one.stage, one.stage_steps_done, _NOTHING) for one in members]
        return TaskFinished(task_id, task_s(self.controller.cost, task, members[0].request), tuple(results))

    def _expect(self, run: Run, task_id: int, end: Event) -> None:
        self.runs.append(run)
        self.ready_s.update(dict.fromkeys(run.task.members, run.end_s))
        self.free_s.update(dict.fromkeys(run.task.ranks, run.end_s))
        heapq.heappush(self.ends, (run.end_s, task_id, end))

    def _ready_s(self, request_id: str) -> float:
        return self.ready_s.get(request_id, 0.0)

    def _free_s(self, rank: int) -> float:
        return self.free_s.get(rank, 0.0)

    @property
    def _next_s(self) -> float:
        return min(self.ends[0][0], self.timer_s) if self.ends else self.timer_s

    def _landing(self) -> list[Event]:
        """The ends that make up this moment; without a resolution the next one alone, as events come live."""
        until_s = self.now + self.blur * (self.now - self.start_s)
        landing: list[Event] = []
        while self.ends and (self.ends[0][0] < until_s or (not landing and self.ends[0][0] <= self.now)):
            landing.append(heapq.heappop(self.ends)[2])
        return landing

    def _is_any_open(self, awaited: Mapping[str, float]) -> bool:
        return any(self.now <= time_s and name not in self.finish_s for name, time_s in awaited.items())


class _Coarse:
    """`policy` with tasks of steps that last at least `resolution` of the time that lies ahead of `start_s`."""

    def __init__(self, policy: Policy, start_s: float, resolution: float) -> None:
        self._policy = policy
        self._start_s = start_s
        self._resolution = resolution

    def plan(self, state: State, now: float) -> Plan:
        least_s = self._resolution * (now - self._start_s)
        if least_s and (closing := _closing(state)) and len(closing) == len(state.idle_ranks):
            return Plan(closing)  # nothing is left to decide on
        plan = self._policy.plan(state, now)
        if not plan.tasks or not least_s:
            return plan
        waiting = {trajectory.request_id: trajectory for trajectory in state.waiting}
        tasks = tuple(_lengthened(task, waiting, state, least_s) for task in plan.tasks)
        return Plan(tasks, plan.wake_at)


def _closing(state: State) -> tuple[Task, ...]:
    """The tasks of requests that wait for their last stage, a short one, each on its idle leader."""
    idle = set(state.idle_ranks)
    tasks = []
    for trajectory in state.waiting:
        leader = next(iter(trajectory.holders), None)
        is_last = trajectory.stage_index == len(trajectory.request.stages) - 1
        if is_last and trajectory.is_short and leader in idle:
            idle.discard(leader)
            tasks.append(Task((trajectory.request_id,), trajectory.stage.kind, (leader,)))
    return tuple(tasks)


def _lengthened(task: Task, waiting: Mapping[str, Trajectory], state: State, least_s: float) -> Task:
    if not (task.num_steps and task.members and waiting.keys() >= set(task.members)):
        return task
    members = [waiting[request_id] for request_id in task.members]
    step_s = times_per_step(state.cost, members[0].request).get(task.degree, math.inf)
    most = min([trajectory.remaining_steps for trajectory in members])
    return replace(task, num_steps=min(max(task.num_steps, math.ceil(least_s / step_s)), most))
