"""A task in flight, as its ranks tell of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tetriserve.core.events import FailureKind, StartTask, TaskFailed
from tetriserve.core.messages import TaskDone, TaskError


@dataclass
class Running:
    """Which members have yet to answer, and what the others said.

    lost_reason: of a member that died, unless we ended it because others had failed before.
    """

    start: StartTask
    pending: set[int]
    done: TaskDone | None = None
    errors: list[TaskError] = field(default_factory=list)
    lost_reason: str | None = None

    @property
    def failure(self) -> TaskFailed | None:
        """What to say of it if it failed: a dead worker explains its peers' errors, else the earliest error does."""
        task_id = self.start.task_id
        if self.lost_reason is not None:
            return TaskFailed(task_id, FailureKind.LOST, self.lost_reason)
        if not self.errors:
            return None
        first = min(self.errors, key=lambda error: error.failed_at)
        message = f"a rank ran out of memory: {first.message}" if first.kind is FailureKind.MEMORY else first.message
        return TaskFailed(task_id, first.kind, message)
