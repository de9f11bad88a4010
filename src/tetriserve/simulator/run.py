"""Drives the controller through an event heap: arrivals from a workload, task ends from a cost model."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import assert_never

from tetriserve.control.controller import Controller
from tetriserve.core.cost import task_s
from tetriserve.core.events import (
    CloseCancelled,
    Command,
    Event,
    FailRequest,
    FinishRequest,
    ForgetRequest,
    StartTask,
    Submitted,
    TaskFinished,
    TensorRef,
    TimerFired,
    WakeAt,
    WorkerJoined,
)
from tetriserve.core.plan import LATE_SHARE, CostModel, Task
from tetriserve.core.request import Request
from tetriserve.policies.policy import Policy
from tetriserve.workload.outcome import Outcome, Status

_NOTHING = TensorRef("simulated", 0)


def simulate(
    policy: Policy,
    cost: CostModel,
    requests: Iterable[Request],
    *,
    num_ranks: int,
    noise: float = 0.0,
    seed: int = 0,
    late_share: float = LATE_SHARE,
) -> Iterator[Outcome]:
    """What becomes of `requests` (in order of arrival, which may be endless), in the order in which they end.

    noise: standard deviation of a task's duration as a fraction of it; 0 is what the cost model says, exactly.
    """
    simulation = Simulation(policy, cost, num_ranks=num_ranks, noise=noise, seed=seed, late_share=late_share)
    return simulation.run(requests)


@dataclass(order=True)
class _Scheduled:
    """An event to come; of several at one time the first scheduled goes first."""

    time_s: float
    number: int
    event: Event = field(compare=False)


class Simulation:
    """One run. The same controller as live, with a heap for a clock; deterministic for a seed."""

    def __init__(
        self,
        policy: Policy,
        cost: CostModel,
        *,
        num_ranks: int,
        noise: float = 0.0,
        seed: int = 0,
        late_share: float = LATE_SHARE,
    ) -> None:
        if num_ranks < 1:
            raise ValueError(f"num_ranks is {num_ranks}; it must be at least 1")
        if noise < 0:
            raise ValueError(f"noise is {noise}; it must not be negative")
        self.controller = Controller(policy, cost, late_share=late_share)
        self.now = 0.0
        self._cost = cost  # what happens; the controller's own copy is what it believes
        self._noise = noise
        self._random = random.Random(seed)
        self._heap: list[_Scheduled] = []
        self._num_scheduled = 0
        self._timer: _Scheduled | None = None
        self._ranks: dict[str, tuple[int, ...]] = {}  # of each request's last task
        for rank in range(num_ranks):
            self._take(WorkerJoined(rank))

    def run(
        self, requests: Iterable[Request], admits: Callable[[Request], bool] = lambda request: True
    ) -> Iterator[Outcome]:
        """Outcomes in the order in which requests end; last those that the policy never finished, as failed.

        admits: asked of each request when it arrives; one that is refused leaves no outcome.
        """
        for request in requests:
            yield from self._run_until(request.arrival_s)
            self.now = max(self.now, request.arrival_s)
            if admits(request):
                yield from self._take(Submitted(request))
        yield from self._run_until(float("inf"))
        for trajectory in self.controller.state.trajectories:  # no event is left that could move them
            request = trajectory.request
            yield Outcome(
                request=request, status=Status.FAILED, runs=(), finish_s=self.now,
                predicted_finish_s=self.controller.earliest_finish(request, self.now),
                message="the policy left it unfinished",
            )  # fmt: skip

    def _run_until(self, time_s: float) -> Iterator[Outcome]:
        while self._heap and self._heap[0].time_s <= time_s:
            scheduled = heapq.heappop(self._heap)
            if isinstance(scheduled.event, TimerFired):
                if scheduled is not self._timer:
                    continue  # a later wish replaced it
                self._timer = None
            self.now = scheduled.time_s
            yield from self._take(scheduled.event)

    def _take(self, event: Event) -> list[Outcome]:
        return [
            outcome
            for command in self.controller.handle(event, self.now)
            if (outcome := self._carry_out(command)) is not None
        ]

    def _carry_out(self, command: Command) -> Outcome | None:
        match command:
            case StartTask():
                elapsed_s = self._duration_s(command)
                end_s = self.now + self._start_s(command.task) + elapsed_s
                self._schedule(end_s, TaskFinished.planned(command, elapsed_s, _NOTHING))
            case WakeAt(time_s):
                if self._timer is None or self._timer.time_s != time_s:
                    self._timer = self._schedule(max(time_s, self.now), TimerFired())
            case FinishRequest(request, runs, predicted_finish_s, _):
                del self._ranks[request.request_id]
                return Outcome(
                    request=request, status=Status.FINISHED, runs=runs,
                    predicted_finish_s=predicted_finish_s, finish_s=self.now,
                )  # fmt: skip
            case FailRequest() | CloseCancelled() | ForgetRequest():
                pass  # no task fails and no client leaves here, and there is no state to drop
            case _:
                assert_never(command)
        return None

    def _start_s(self, task: Task) -> float:
        is_moved = any(set(self._ranks.get(name, task.ranks)) != set(task.ranks) for name in task.members)
        self._ranks.update(dict.fromkeys(task.members, task.ranks))
        return self._cost.switch_s + (self._cost.move_s if is_moved else 0.0)

    def _duration_s(self, command: StartTask) -> float:
        seconds = task_s(self._cost, command.task, command.work[0].request)
        return seconds * max(0.1, self._random.gauss(1.0, self._noise)) if self._noise else seconds

    def _schedule(self, time_s: float, event: Event) -> _Scheduled:
        scheduled = _Scheduled(time_s, self._num_scheduled, event)
        self._num_scheduled += 1
        heapq.heappush(self._heap, scheduled)
        return scheduled
