"""What policies read and answer: the state of the pool, and the tasks they want started."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from tetriserve.core.cluster import ANYWHERE, ONE_NODE, Nodes, StageRanks
from tetriserve.core.request import Lora, Request, Stage
from tetriserve.core.trajectory import Trajectory

LATE_SHARE = 0.05
"""Part of the pool's rank time that is owed to the request longest overdue, by default (`control.overdue`)."""


@dataclass(frozen=True, slots=True)
class Task:
    """The unit of dispatch: a short stage, or some steps of a stage that has steps, of one request or of several that
    share it, on a set of ranks.

    members: ids of the requests.
    stage: its kind, the same for all.
    ranks: the first is the leader: it keeps the copies of the requests' states that the task leaves behind.
    num_steps: of each member, at most; 0 for a short stage.
    """

    members: tuple[str, ...]
    stage: str
    ranks: tuple[int, ...]
    num_steps: int = 0

    @property
    def degree(self) -> int:
        """Degree of sequence parallelism."""
        return len(self.ranks)

    @property
    def batch(self) -> int:
        """How many requests share it."""
        return len(self.members)


@dataclass(frozen=True, slots=True)
class InFlight:
    """A task that runs now, with the end that the cost model predicted for it when it started."""

    task_id: int
    task: Task
    start_s: float
    end_s: float


class CostModel(Protocol):
    """What a stage of a request is expected to take, in seconds. Nothing is ever free."""

    def times(self, request: Request, stage: Stage, batch: int = 1) -> Mapping[int, float]:
        """Seconds by degree, ascending, for the degrees that the request can run this stage at: of one step where the
        stage has steps, of all of it where it has none; for `batch` requests of one kind together."""
        ...

    def joins_passes(self, request: Request, stage: Stage, degree: int, batch: int) -> bool:
        """Whether a step of several passes counts as quicker with all of them in one forward: `times` has the quicker
        way. Never for a request alone, which goes through the model as it would through its own pipeline."""
        ...

    @property
    def max_batch(self) -> int:
        """The largest number of requests in a task; 1 where no batch was measured."""
        ...

    @property
    def switch_s(self) -> float:
        """Fixed cost of starting any task."""
        ...

    @property
    def move_s(self) -> float:
        """What a task costs on top of that on other ranks than the request's last: change of group, hand-over."""
        ...

    @property
    def move_node_s(self) -> float:
        """The same where the request's last ranks are on another node."""
        ...

    @property
    def team_s(self) -> float:
        """What a task costs on top of that on ranks that have not worked together before; 0: any set will do."""
        ...

    @property
    def lora_s(self) -> float:
        """What a task costs on top of that on ranks that have another LoRA active than its requests', or none."""
        ...

    def observed(self, task: Task, request: Request, elapsed_s: float) -> CostModel:
        """The same model corrected by what a task took that `request` is a member of; `self` is unchanged."""
        ...


LATELY_S = 60.0
"""How long a kind stays in `State.lately` after the last request of it arrived."""


@dataclass(frozen=True)
class State:
    """Everything a policy may know: a snapshot that nobody mutates.

    trajectories: the unfinished ones, in order of arrival.
    ranks: the living ranks, ascending; ranks busy with `in_flight` tasks included.
    late_credit_s: rank-seconds that the pool owes to the request longest overdue; while it is positive, that one may
        start before requests that can still be in time (`policies.overdue`).
    stage_ranks: which ranks may run which stages.
    nodes: which ranks share a node; the ranks of a task do.
    loras: by rank, the adapter that its last task of an adapted stage ran with; ranks with none are left out. A hint
        for placement: a rank switches by itself.
    lately: one request of each kind that arrived in the last `LATELY_S` seconds, finished or not. Policies expect more
        requests of these kinds.
    """

    trajectories: tuple[Trajectory, ...]
    in_flight: tuple[InFlight, ...]
    ranks: tuple[int, ...]
    cost: CostModel
    late_credit_s: float = 0.0
    stage_ranks: StageRanks = ANYWHERE
    loras: Mapping[int, Lora] = field(default_factory=dict)
    nodes: Nodes = ONE_NODE
    lately: tuple[Request, ...] = ()

    @cached_property
    def idle_ranks(self) -> tuple[int, ...]:
        busy = {rank for flight in self.in_flight for rank in flight.task.ranks}
        return tuple(rank for rank in self.ranks if rank not in busy)

    @cached_property
    def flights(self) -> dict[str, InFlight]:
        """The task in flight that each running request takes part in, by request id."""
        return {request_id: flight for flight in self.in_flight for request_id in flight.task.members}

    @cached_property
    def waiting(self) -> tuple[Trajectory, ...]:
        """Trajectories that no task runs for, in order of arrival."""
        return tuple(trajectory for trajectory in self.trajectories if not trajectory.is_running)

    def num_ranks_for(self, request: Request, stage: Stage) -> int:
        """Living ranks that one task of `stage` of `request` may have: on one node, and allowed to run it."""
        if not self.stage_ranks:
            return self._widest_node if self.nodes.are_several else len(self.ranks)
        return self.nodes.most(self.stage_ranks.among(request.model, stage.kind, self.ranks))

    @cached_property
    def _widest_node(self) -> int:
        return self.nodes.most(self.ranks)

    def can_serve(self, trajectory: Trajectory) -> bool:
        """Whether living ranks may run its present stage, and its steps at one of its degrees."""
        return can_serve(trajectory, self.ranks, self.stage_ranks, self.nodes)


def can_serve(trajectory: Trajectory, ranks: Collection[int], stage_ranks: StageRanks, nodes: Nodes = ONE_NODE) -> bool:
    """See `State.can_serve`."""
    request = trajectory.request
    if not stage_ranks:
        return request.can_run_on(nodes.most(ranks))
    num_for_steps = nodes.most(stage_ranks.among(request.model, request.stepped.kind, ranks))
    can_go_on = trajectory.is_over or bool(stage_ranks.among(request.model, trajectory.stage.kind, ranks))
    return can_go_on and num_for_steps > 0 and request.can_run_on(num_for_steps)


@dataclass(frozen=True, slots=True)
class Plan:
    """Tasks to start now, on ranks idle in the state the plan was made from, and when to ask again at the latest."""

    tasks: tuple[Task, ...] = ()
    wake_at: float | None = None
