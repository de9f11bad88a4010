"""Where every request stands, and which ranks live (TetriServe, section 4.1: the request tracker)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from tetriserve.core.cluster import ANYWHERE, ONE_NODE, Nodes, StageRanks
from tetriserve.core.events import Checkpoint, Result, Run, States, Work
from tetriserve.core.plan import LATELY_S, CostModel, InFlight, State, Task, can_serve
from tetriserve.core.request import Lora, Request, Stage
from tetriserve.core.stages import ADAPTED
from tetriserve.core.trajectory import Trajectory


@dataclass(slots=True)
class Record:
    """One unfinished request.

    states: its state in the store; never changed in place, as commands carry it.
    num_losses: tasks lost since the last one that finished.
    """

    trajectory: Trajectory
    predicted_finish_s: float
    states: States = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    num_losses: int = 0
    is_cancelled: bool = False

    @property
    def request(self) -> Request:
        return self.trajectory.request

    @property
    def name(self) -> str:
        return self.trajectory.request.request_id

    @property
    def work(self) -> Work:
        """Its part of the task that starts now."""
        trajectory = self.trajectory
        return Work(trajectory.request, trajectory.stage_index, trajectory.stage_steps_done, self.states)

    def advance(self, flight: InFlight, end_s: float, result: Result) -> None:
        """Take in a finished task, by what it reports."""
        task = flight.task
        if result.num_steps != task.num_steps:
            task = replace(task, num_steps=result.num_steps)
        self.runs.append(Run(task, flight.start_s, end_s, result.text))
        self.num_losses = 0
        self.states = {**self.states, task.stage: result.left}
        after = self.trajectory.after(result.num_steps, is_stage_over=result.is_stage_over)
        self.trajectory = replace(after, holders=task.ranks, is_running=False, lost_degree=0)

    def lose(self, task: Task) -> None:
        """Take in a task that was lost with its workers."""
        self.num_losses += 1
        self.trajectory = replace(self.trajectory, lost_degree=task.degree)

    def set_apart(self) -> None:
        """A task that it shared has failed, maybe through its own fault."""
        self.trajectory = replace(self.trajectory, is_apart=True)

    def skip_first_stage(self) -> Stage | None:
        """The first stage, if it is short and waits to begin; it is taken for over from now on."""
        if self.trajectory.has_started or not self.trajectory.is_short:
            return None
        skipped = self.trajectory.stage
        self.trajectory = self.trajectory.after(0, is_stage_over=True)
        return skipped

    def set_running(self, is_running: bool) -> None:
        self.trajectory = replace(self.trajectory, is_running=is_running)


class Tracker:
    """Bookkeeping without decisions: requests by id in order of arrival, tasks in flight, living ranks, and the
    adapters that those have active.

    stage_ranks, nodes: which ranks may run which stages and which share a node, living or not.
    """

    def __init__(self, stage_ranks: StageRanks = ANYWHERE, nodes: Nodes = ONE_NODE) -> None:
        self.stage_ranks = stage_ranks
        self.nodes = nodes
        self.records: dict[str, Record] = {}
        self.in_flight: dict[int, InFlight] = {}
        self.ranks: set[int] = set()
        self.loras: dict[int, Lora] = {}
        self._arrivals: dict[tuple[object, ...], tuple[float, Request]] = {}  # the last of each kind, the oldest first
        self._lately: tuple[Request, ...] | None = ()
        self._busy: set[int] = set()  # by tasks in flight, living or not
        self._next_task_id = 0

    def fork(self) -> Tracker:
        """An equal tracker that is changed on its own; records start without the history of their runs."""
        forked = Tracker(self.stage_ranks, self.nodes)
        forked.records = {name: replace(record, runs=[]) for name, record in self.records.items()}
        forked.in_flight = dict(self.in_flight)
        forked.ranks = set(self.ranks)
        forked.loras = dict(self.loras)
        forked._arrivals = dict(self._arrivals)
        forked._lately = self._lately
        forked._busy = set(self._busy)
        forked._next_task_id = self._next_task_id
        return forked

    def state(self, cost: CostModel, late_credit_s: float = 0.0) -> State:
        return State(
            trajectories=tuple(record.trajectory for record in self.records.values() if not record.is_cancelled),
            in_flight=tuple(self.in_flight.values()),
            ranks=tuple(sorted(self.ranks)),
            cost=cost,
            late_credit_s=late_credit_s,
            stage_ranks=self.stage_ranks,
            loras=dict(self.loras),
            nodes=self.nodes,
            lately=self.lately,
        )

    @property
    def lately(self) -> tuple[Request, ...]:
        """See `State.lately`; as of the last `note_time`."""
        if self._lately is None:
            self._lately = tuple([request for _, request in self._arrivals.values()])
        return self._lately

    def note_arrival(self, request: Request, now: float) -> None:
        self._arrivals.pop(request.kind, None)
        self._arrivals[request.kind] = (now, request)
        self._lately = None

    def note_time(self, now: float) -> None:
        """Arrivals that are too long ago count no more."""
        for kind, (arrived_s, _) in list(self._arrivals.items()):
            if now - arrived_s <= LATELY_S:
                break
            del self._arrivals[kind]
            self._lately = None

    @property
    def first_deadline_s(self) -> float:
        """The earliest deadline of what is unfinished and can run on the living ranks; infinity for none."""
        first_s, ranks, stage_ranks = math.inf, self.ranks, self.stage_ranks
        for record in self.records.values():
            trajectory = record.trajectory
            is_earlier = trajectory.request.deadline_s < first_s and not record.is_cancelled
            if is_earlier and can_serve(trajectory, ranks, stage_ranks, self.nodes):
                first_s = trajectory.request.deadline_s
        return first_s

    @property
    def idle_ranks(self) -> set[int]:
        return self.ranks - self._busy

    def are_idle(self, ranks: tuple[int, ...]) -> bool:
        return self.ranks.issuperset(ranks) and self._busy.isdisjoint(ranks)

    def switches_lora(self, task: Task) -> bool:
        """Whether a rank of `task`, which has yet to start, has another adapter active than its members want."""
        lora = self.records[task.members[0]].request.lora
        return task.stage in ADAPTED and any(self.loras.get(rank) != lora for rank in task.ranks)

    def admit(self, request: Request, predicted_finish_s: float, checkpoint: Checkpoint | None = None) -> None:
        assert request.request_id not in self.records, "request ids are unique among unfinished requests"
        record = Record(Trajectory.at(request, 0), predicted_finish_s)
        if checkpoint is not None:
            record.trajectory = Trajectory.at(request, checkpoint.stage_index, checkpoint.stage_steps_done)
            record.states, record.runs = checkpoint.states, [*checkpoint.runs]
        self.records[request.request_id] = record

    def take_off(self, task: Task, start_s: float, end_s: float) -> int:
        """Mark the task as in flight and name it."""
        task_id = self._next_task_id
        self._next_task_id += 1
        self.in_flight[task_id] = InFlight(task_id, task, start_s, end_s)
        self._busy.update(task.ranks)
        for request_id in task.members:
            self.records[request_id].set_running(True)
        if self.switches_lora(task):
            self._set_lora(task.ranks, self.records[task.members[0]].request.lora)
        return task_id

    def land(self, task_id: int) -> tuple[InFlight, list[Record]]:
        """The task is over, one way or another; the records are its members', in order."""
        flight = self.in_flight.pop(task_id)
        self._busy.difference_update(flight.task.ranks)
        records = [self.records[request_id] for request_id in flight.task.members]
        for record in records:
            record.set_running(False)
        return flight, records

    def lose(self, rank: int) -> None:
        """The rank is gone with everything it held; tasks in flight on it end by events of their own."""
        self.ranks.discard(rank)
        self.loras.pop(rank, None)
        for record in self.records.values():
            if rank in record.trajectory.holders:
                holders = tuple(holder for holder in record.trajectory.holders if holder != rank)
                record.trajectory = replace(record.trajectory, holders=holders)

    def _set_lora(self, ranks: tuple[int, ...], lora: Lora | None) -> None:
        for rank in ranks:
            if lora is None:
                self.loras.pop(rank, None)
            else:
                self.loras[rank] = lora
