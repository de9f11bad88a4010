"""Drives the controller in virtual time: arrivals from a workload, task ends from a cost model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator

from tetriserve.control.controller import Controller
from tetriserve.control.virtual_pool import VirtualPool
from tetriserve.core.cluster import ANYWHERE, ONE_NODE, Nodes, StageRanks
from tetriserve.core.cost import move_s, task_s
from tetriserve.core.events import Event, FinishRequest, StartTask, Submitted, TaskFinished, TensorRef, WorkerJoined
from tetriserve.core.plan import LATE_SHARE, CostModel, Task
from tetriserve.core.request import Lora, Request
from tetriserve.core.stages import ADAPTED
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
    stage_ranks: StageRanks = ANYWHERE,
    nodes: Nodes = ONE_NODE,
) -> Iterator[Outcome]:
    """What becomes of `requests` (in order of arrival, which may be endless), in the order in which they end.

    A task on other ranks than its request's last takes `move_s` longer (`move_node_s` from another node), one on ranks
    that have another LoRA active `lora_s`. `team_s` decides which ranks a policy chooses,
    but is not charged: which sets have worked together before is not modelled.

    stage_ranks, nodes: which ranks may run which stages, and which share a node.
    noise: standard deviation of a task's duration as a fraction of it; 0 is what the cost model says, exactly.
    """
    simulation = Simulation(
        policy, cost, num_ranks=num_ranks, noise=noise, seed=seed, late_share=late_share, stage_ranks=stage_ranks,
        nodes=nodes,
    )  # fmt: skip
    return simulation.run(requests)


class Simulation:
    """One run. The same controller as live, in virtual time; deterministic for a seed."""

    def __init__(
        self,
        policy: Policy,
        cost: CostModel,
        *,
        num_ranks: int,
        noise: float = 0.0,
        seed: int = 0,
        late_share: float = LATE_SHARE,
        stage_ranks: StageRanks = ANYWHERE,
        nodes: Nodes = ONE_NODE,
    ) -> None:
        if num_ranks < 1:
            raise ValueError(f"num_ranks is {num_ranks}; it must be at least 1")
        if noise < 0:
            raise ValueError(f"noise is {noise}; it must not be negative")
        self.controller = Controller(policy, cost, late_share=late_share, stage_ranks=stage_ranks, nodes=nodes)
        self._pool = VirtualPool(self.controller, 0.0, start=self._start, finish=self._finish)
        self._nodes = nodes
        self._cost = cost  # what happens; the controller's own copy is what it believes
        self._noise = noise
        self._random = random.Random(seed)
        self._ranks: dict[str, tuple[int, ...]] = {}  # of each request's last task
        self._loras: dict[int, Lora | None] = {}  # that each rank has active
        self._outcomes: list[Outcome] = []  # of requests that have just ended
        for rank in range(num_ranks):
            self._pool.handle(WorkerJoined(rank))

    @property
    def now(self) -> float:
        return self._pool.now

    def run(
        self, requests: Iterable[Request], admits: Callable[[Request], bool] = lambda request: True
    ) -> Iterator[Outcome]:
        """Outcomes in the order in which requests end; last those that the policy never finished, as failed.

        admits: asked of each request when it arrives; one that is refused leaves no outcome.
        """
        for request in requests:
            yield from self._run_until(request.arrival_s)
            self._pool.now = max(self.now, request.arrival_s)
            if admits(request):
                self._pool.handle(Submitted(request))
                yield from self._take_outcomes()
        yield from self._run_until(math.inf)
        for trajectory in self.controller.state.trajectories:  # no event is left that could move them
            request = trajectory.request
            yield Outcome(
                request=request, status=Status.FAILED, runs=(), finish_s=self.now,
                predicted_finish_s=self.controller.earliest_finish(request, self.now),
                message="the policy left it unfinished",
            )  # fmt: skip

    def _run_until(self, time_s: float) -> Iterator[Outcome]:
        while self._pool.advance(time_s):
            yield from self._take_outcomes()

    def _take_outcomes(self) -> list[Outcome]:
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _start(self, start: StartTask) -> tuple[float, Event]:
        elapsed_s = self._duration_s(start)
        end_s = self.now + self._start_s(start.task) + self._lora_s(start) + elapsed_s
        return end_s, TaskFinished.planned(start, elapsed_s, _NOTHING)

    def _finish(self, command: FinishRequest) -> None:
        del self._ranks[command.request.request_id]
        outcome = Outcome(
            request=command.request, status=Status.FINISHED, runs=command.runs,
            predicted_finish_s=command.predicted_finish_s, finish_s=self.now,
        )  # fmt: skip
        self._outcomes.append(outcome)

    def _start_s(self, task: Task) -> float:
        moves_s = [move_s(self._cost, self._ranks.get(name, ()), task.ranks, self._nodes) for name in task.members]
        self._ranks.update(dict.fromkeys(task.members, task.ranks))
        return self._cost.switch_s + max(moves_s)

    def _lora_s(self, start: StartTask) -> float:
        task, lora = start.task, start.work[0].request.lora
        if task.stage not in ADAPTED or all(self._loras.get(rank) == lora for rank in task.ranks):
            return 0.0
        self._loras.update(dict.fromkeys(task.ranks, lora))
        return self._cost.lora_s

    def _duration_s(self, start: StartTask) -> float:
        seconds = task_s(self._cost, start.task, start.work[0].request)
        return seconds * max(0.1, self._random.gauss(1.0, self._noise)) if self._noise else seconds
