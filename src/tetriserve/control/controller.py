"""Events in, commands out: the whole life of a request, without a clock, a socket or a thread."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import assert_never

from tetriserve.control.admission import earliest_finish
from tetriserve.control.overdue import LateAccount
from tetriserve.control.recovery import lost_tasks
from tetriserve.control.tracker import Record, Tracker
from tetriserve.core.cluster import ANYWHERE, ONE_NODE, Nodes, StageRanks
from tetriserve.core.cost import move_s, stage_s, task_s
from tetriserve.core.errors import TetriServeError
from tetriserve.core.events import (
    Cancelled,
    CloseCancelled,
    Command,
    Event,
    FailRequest,
    FailureKind,
    FinishRequest,
    ForgetRequest,
    Output,
    StartTask,
    StateLost,
    Submitted,
    TaskFailed,
    TaskFinished,
    TimerFired,
    WakeAt,
    WorkerJoined,
    WorkerLost,
)
from tetriserve.core.plan import LATE_SHARE, CostModel, Plan, State, Task
from tetriserve.core.request import Request
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.nodes import within_nodes
from tetriserve.policies.policy import Policy
from tetriserve.policies.room import within_limits

logger = logging.getLogger(__name__)


class PolicyError(TetriServeError):
    """A policy planned what cannot be: a defect of the policy, not of a request."""


class Controller:
    """Drives requests through a pool of ranks as `policy` says; only lost tasks start again without being asked for.

    `cost` is corrected by every task that finishes. A request whose workers die or run out of memory more than
    `max_losses` times in a row is failed alone: it may be what kills them. `late_share` of the pool's rank time is owed
    to the request longest overdue, for as long as there is one. `stage_ranks` says which ranks may run which stages;
    a plan that does not know of it is changed so that it keeps to it (`policies.room.within_limits`).
    `nodes` says which ranks share a node; no task goes across nodes (`policies.nodes.within_nodes`).
    """

    def __init__(
        self,
        policy: Policy,
        cost: CostModel,
        *,
        max_losses: int = 5,
        late_share: float = LATE_SHARE,
        stage_ranks: StageRanks = ANYWHERE,
        nodes: Nodes = ONE_NODE,
    ) -> None:
        self.policy = policy
        self.cost = cost
        self._max_losses = max_losses
        self._late = LateAccount(late_share)
        self._first_deadline_s = math.inf
        self._tracker = Tracker(stage_ranks, nodes)

    def handle(self, event: Event, now: float) -> list[Command]:
        """What to do about `event`, which happened at `now` (seconds since the engine started).

        Raises:
            PolicyError: the policy's plan uses a rank, a request or a number of steps that it may not.
        """
        return self.handle_all((event,), now)

    def handle_all(self, events: Iterable[Event], now: float) -> list[Command]:
        """What to do about several events that happened at `now`, with one plan for all of them; see `handle`."""
        commands = [command for event in events for command in self._apply(event, now)]
        self._tracker.note_time(now)
        self._first_deadline_s = self._tracker.first_deadline_s
        self._late.accrue(now, len(self._tracker.ranks), self._first_deadline_s)
        state = self.state
        if again := [self._start(task, now) for task in within_nodes(Plan(tuple(lost_tasks(state))), state, now).tasks]:
            commands += again
            state = self.state
        plan = within_nodes(within_limits(self.policy.plan(state, now), state), state, now)
        commands += [self._start(task, now) for task in plan.tasks]
        if plan.wake_at is not None:
            commands.append(WakeAt(plan.wake_at))
        return commands

    @property
    def state(self) -> State:
        return self._tracker.state(self.cost, self._late.balance_s)

    @property
    def num_unfinished(self) -> int:
        """Requests that are waiting or running, those included whose client has left a running task behind."""
        return len(self._tracker.records)

    def fork(self, policy: Policy) -> Controller:
        """An equal controller that goes its own way from here: what-if runs start with one.

        policy: one of the same kind; it may keep facts about trajectories, so an instance serves one controller.
        """
        forked = Controller(policy, self.cost, max_losses=self._max_losses)
        forked._tracker = self._tracker.fork()
        forked._late = self._late.fork()
        return forked

    def skip_first_stages(self) -> dict[str, float]:
        """Take short first stages that wait to begin for over; what each would have taken, by request id.

        Those that other ranks may run than the steps that follow are left: what follows may run beside them.
        """
        role = self._tracker.stage_ranks.role
        return {
            request.request_id: stage_s(self.cost, request, skipped, min(self.cost.times(request, skipped)))
            for record in self._tracker.records.values()
            if role((request := record.request).model, record.trajectory.stage.kind)
            == role(request.model, request.stepped.kind)
            and (skipped := record.skip_first_stage()) is not None
        }

    def earliest_finish(self, request: Request, now: float) -> float:
        """When `request` could finish at the earliest if it were admitted now; see `control.admission`."""
        return earliest_finish(self.state, request, now)

    def _apply(self, event: Event, now: float) -> list[Command]:
        tracker = self._tracker
        match event:
            case Submitted(request, promised_finish_s, checkpoint):
                if promised_finish_s is None:
                    promised_finish_s = self.earliest_finish(request, now)
                tracker.admit(request, promised_finish_s, checkpoint)
                tracker.note_arrival(request, now)
            case Cancelled(request_id):
                return self._cancel(request_id)
            case TaskFinished():
                return self._finish_task(event, now)
            case TaskFailed():
                return self._fail_task(event)
            case WorkerLost(rank):
                tracker.lose(rank)
            case WorkerJoined(rank):
                tracker.ranks.add(rank)
            case StateLost(request_id):
                if (record := tracker.records.get(request_id)) is not None:
                    record.go_back(event)
            case TimerFired():
                pass
            case _:
                assert_never(event)
        return []

    def _start(self, task: Task, now: float) -> StartTask:
        self._check(task)
        records = [self._tracker.records[request_id] for request_id in task.members]
        end_s = now + self.cost.switch_s + task_s(self.cost, task, records[0].request)
        nodes = self._tracker.nodes
        end_s += max([move_s(self.cost, record.trajectory.holders, task.ranks, nodes) for record in records])
        if self._tracker.switches_lora(task):
            end_s += self.cost.lora_s
        for record in records:
            gpu_s = (end_s - now) * task.degree / len(records)
            self._late.charge(gpu_s, record.request.deadline_s, now, self._first_deadline_s)
        stage = records[0].trajectory.stage
        joins_passes = stage.num_passes > 1 and self.cost.joins_passes(
            records[0].request, stage, task.degree, task.batch
        )
        task_id = self._tracker.take_off(task, now, end_s)
        return StartTask(task_id, task, tuple([record.work for record in records]), joins_passes)

    def end_s(self, task_id: int) -> float:
        """When a task in flight was expected to end as it started."""
        return self._tracker.in_flight[task_id].end_s

    def _cancel(self, request_id: str) -> list[Command]:
        """A running task is left to end: tasks are short, and a collective cannot be left by one rank alone."""
        record = self._tracker.records.get(request_id)
        if record is None:
            return []
        record.is_cancelled = True
        return [] if record.trajectory.is_running else self._close(record)

    def _finish_task(self, event: TaskFinished, now: float) -> list[Command]:
        flight, records = self._tracker.land(event.task_id)
        self._learn(flight.task, records[0].request, event)
        commands: list[Command] = []
        for record, result in zip(records, event.results, strict=True):
            record.advance(flight, now, result)
            if record.is_cancelled:
                commands += self._close(record)
            elif record.trajectory.is_over:
                output = Output(result.left, record.request.media_type)
                finish = FinishRequest(record.request, tuple(record.runs), record.predicted_finish_s, output)
                commands += [finish, self._forget(record)]
        return commands

    def _learn(self, task: Task, request: Request, event: TaskFinished) -> None:
        """Correct the cost model by a task that went all the way it was planned."""
        if any(result.num_steps != task.num_steps for result in event.results):
            return
        # As in every simulation without noise: what went as believed teaches nothing, and corrections cost time.
        if not math.isclose(event.elapsed_s, task_s(self.cost, task, request)):
            self.cost = self.cost.observed(task, request, event.elapsed_s)

    def _fail_task(self, event: TaskFailed) -> list[Command]:
        flight, records = self._tracker.land(event.task_id)
        return [command for record in records for command in self._fail_member(event, flight.task, record)]

    def _fail_member(self, event: TaskFailed, task: Task, record: Record) -> list[Command]:
        if record.is_cancelled:
            return self._close(record)
        message = event.message
        if task.batch > 1:
            record.set_apart()
            if event.kind not in (FailureKind.MEMORY, FailureKind.LOST):
                logger.warning("request %s goes on alone after a shared task failed: %s", record.name, message)
                return []
        if event.kind in (FailureKind.MEMORY, FailureKind.LOST):
            record.lose(task)
            if record.num_losses <= self._max_losses:
                logger.warning(
                    "request %s continues from step %d after a lost task: %s",
                    record.name, record.trajectory.steps_done, message,
                )  # fmt: skip
                return []
            message = f"its workers were lost {record.num_losses} times in a row, last: {message}"
        fail = FailRequest(record.request, tuple(record.runs), record.predicted_finish_s, message, event.kind)
        return [fail, self._forget(record)]

    def _close(self, record: Record) -> list[Command]:
        """A cancelled request for which nothing runs any more."""
        close = CloseCancelled(record.request, tuple(record.runs), record.predicted_finish_s)
        return [close, self._forget(record)]

    def _forget(self, record: Record) -> ForgetRequest:
        request_id = record.request.request_id
        del self._tracker.records[request_id]
        return ForgetRequest(request_id)

    def _check(self, task: Task) -> None:
        """Policies are public and may be a third party's; a wrong plan must not reach the workers."""
        name = type(self.policy).__name__
        if not task.members or len(set(task.members)) < len(task.members):
            raise PolicyError(f"{name} planned a task for {task.members}; it needs requests, each once")
        if not task.ranks or len(set(task.ranks)) < task.degree or not self._tracker.are_idle(task.ranks):
            raise PolicyError(f"{name} planned ranks {task.ranks}; idle are {tuple(sorted(self._tracker.idle_ranks))}")
        if not self._tracker.nodes.share(task.ranks):
            raise PolicyError(f"{name} planned ranks {task.ranks}, which are not on one node")
        members = [self._check_member(task, request_id) for request_id in task.members]
        if task.batch > 1:
            self._check_shared(task, members)

    def _check_shared(self, task: Task, members: Sequence[Trajectory]) -> None:
        name, first = type(self.policy).__name__, members[0]
        for other in members[1:]:
            if other.request.kind != first.request.kind:
                raise PolicyError(
                    f"{name} planned one task for {first.request_id} and {other.request_id}, which differ in size, "
                    "degrees, passes, length of text or LoRA; only requests of one kind may share a task"
                )
        alone = next((member.request_id for member in members if member.is_apart), None)
        if alone is not None or task.batch > self.cost.max_batch:
            why = f"at most {self.cost.max_batch} may share one" if alone is None else f"{alone} must be alone"
            raise PolicyError(f"{name} planned a task for {task.batch} requests; {why}")

    def _check_member(self, task: Task, request_id: str) -> Trajectory:
        record = self._tracker.records.get(request_id)
        name = type(self.policy).__name__
        if record is None or record.is_cancelled or record.trajectory.is_running:
            raise PolicyError(f"{name} planned a task for {request_id}, which is not waiting")
        trajectory = record.trajectory
        stage, degrees = trajectory.stage, self.cost.times(record.request, trajectory.stage)
        if task.stage != stage.kind:
            raise PolicyError(f"{name} planned {task.stage} for {request_id}, which is at {stage.kind}")
        if trajectory.is_short and not (task.num_steps == 0 and task.degree in degrees):
            raise PolicyError(
                f"{name} planned {task.stage} at degree {task.degree} in {task.num_steps} steps; it has none, and "
                f"degrees are {list(degrees)}"
            )
        if not trajectory.is_short and not (
            1 <= task.num_steps <= trajectory.remaining_steps and task.degree in degrees
        ):
            raise PolicyError(
                f"{name} planned {task.num_steps} steps at degree {task.degree} for {request_id}; "
                f"{trajectory.remaining_steps} steps remain, degrees are {list(degrees)}"
            )
        return trajectory
