"""Tasks of a live engine as they went, beside what the cost model had expected of them."""

from __future__ import annotations

from dataclasses import dataclass

from tetriserve.core.events import FailureKind, Run, StartTask, TaskFailed, TaskFinished, TensorRef
from tetriserve.core.plan import CostModel
from tetriserve.core.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedTask:
    """A task that is over.

    steps_done: denoise steps of the request that are over by now.
    failure: why it ended without a result; None if it has one.
    result: what it left in the store; gone as soon as the request's next task has ended.
    step_s: seconds per denoise step, as its leader measured them; None without a result, and in other stages.
    expected_step_s: the same as the cost model had it when the task started; None in other stages.
    """

    request: Request
    run: Run
    steps_done: int
    failure: FailureKind | None
    result: TensorRef | None
    step_s: float | None
    expected_step_s: float | None


@dataclass(frozen=True, slots=True)
class _Started:
    command: StartTask
    start_s: float
    expected_step_s: float | None


class TaskBook:
    """Which tasks run, to say what became of each."""

    def __init__(self) -> None:
        self._started: dict[int, _Started] = {}

    def start(self, command: StartTask, now: float, cost: CostModel) -> None:
        task = command.task
        expected_step_s = cost.times(command.request, task.stage)[task.degree] if task.num_steps else None
        self._started[command.task_id] = _Started(command, now, expected_step_s)

    def end(self, event: TaskFinished | TaskFailed, now: float) -> EndedTask:
        started = self._started.pop(event.task_id)
        task = started.command.task
        steps_done, step_s = started.command.steps_done, None
        if isinstance(event, TaskFinished) and task.num_steps:
            steps_done, step_s = steps_done + task.num_steps, event.elapsed_s / task.num_steps
        return EndedTask(
            request=started.command.request,
            run=Run(task, started.start_s, now, event.text if isinstance(event, TaskFinished) else None),
            steps_done=steps_done,
            failure=None if isinstance(event, TaskFinished) else event.kind,
            result=event.result if isinstance(event, TaskFinished) else None,
            step_s=step_s,
            expected_step_s=started.expected_step_s,
        )
