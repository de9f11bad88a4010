"""Tasks of a live engine as they went, beside what the cost model had expected of them."""

from __future__ import annotations

from dataclasses import dataclass

from tetriserve.core.cost import task_s
from tetriserve.core.events import FailureKind, Result, Run, StartTask, TaskFailed, TaskFinished, Work
from tetriserve.core.plan import CostModel


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedTask:
    """A task that is over.

    work: as it began, in the order of its members.
    results: in the same order; none if it failed. What they name is gone as soon as the member's next task has ended.
    failure: why it ended without results; None if it has some.
    step_s: seconds per step, as its leader measured them; None without results, and in short stages.
    expected_step_s: the same as the cost model had it when the task started; None in short stages.
    """

    work: tuple[Work, ...]
    run: Run
    results: tuple[Result, ...]
    failure: FailureKind | None
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
        expected_step_s = task_s(cost, task, command.work[0].request) / task.num_steps if task.num_steps else None
        self._started[command.task_id] = _Started(command, now, expected_step_s)

    def end(self, event: TaskFinished | TaskFailed, now: float) -> EndedTask:
        started = self._started.pop(event.task_id)
        results, num_steps = (event.results, _num_steps(event)) if isinstance(event, TaskFinished) else ((), 0)
        return EndedTask(
            work=started.command.work,
            run=Run(started.command.task, started.start_s, now),
            results=results,
            failure=None if isinstance(event, TaskFinished) else event.kind,
            step_s=event.elapsed_s / num_steps if isinstance(event, TaskFinished) and num_steps else None,
            expected_step_s=started.expected_step_s,
        )


def _num_steps(event: TaskFinished) -> int:
    return max(result.num_steps for result in event.results)
