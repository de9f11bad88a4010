"""Tasks in flight: which members have yet to answer, which are lost, and how each task ends. It knows no transport."""

from __future__ import annotations

from dataclasses import dataclass, field

from tetriserve.core.events import FailureKind, StartTask, TaskFailed, TaskFinished
from tetriserve.core.messages import TaskDone, TaskError


@dataclass(eq=False)
class Running:
    """One task, as its members tell of it.

    token: its number on this executor; every later task has a higher one.
    pending: members that have yet to answer.
    lost_reason: of a member that died, unless it was ended because others had failed before.
    """

    start: StartTask
    token: int
    pending: set[int]
    done: TaskDone | None = None
    errors: list[TaskError] = field(default_factory=list)
    lost_reason: str | None = None

    def answer(self, rank: int, message: TaskDone | TaskError) -> None:
        """A member that ran out of memory stays pending: its rank is not idle before its worker is replaced.

        Raises:
            ValueError: the leader answers for another number of requests than there are, or of steps than it was to do.
        """
        if isinstance(message, TaskError):
            self.errors.append(message)
            if message.kind is FailureKind.MEMORY:
                return
        elif rank == self.start.task.ranks[0]:
            if len(message.results) != len(self.start.work):
                raise ValueError(f"it has {len(message.results)} results for {len(self.start.work)} requests")
            for result in message.results:
                if not 0 <= result.num_steps <= self.start.task.num_steps:
                    raise ValueError(f"it did {result.num_steps} of {self.start.task.num_steps} steps")
            self.done = message
        self.pending.discard(rank)

    def lose(self, rank: int, reason: str, *, is_victim: bool = False) -> None:
        """`is_victim`: it was ended for being stuck, maybe by what others' errors did to it."""
        self.pending.discard(rank)
        if not (is_victim and self.errors):
            self.lost_reason = reason

    @property
    def end(self) -> TaskFinished | TaskFailed:
        """The result, once no member is pending. A lost worker is the cause of its peers' errors, else the first is."""
        task_id = self.start.task_id
        if self.lost_reason is not None:
            return TaskFailed(task_id, FailureKind.LOST, self.lost_reason)
        if self.errors:
            first = min(self.errors, key=lambda error: error.failed_at)
            is_memory = first.kind is FailureKind.MEMORY
            message = f"a rank ran out of memory: {first.message}" if is_memory else first.message
            return TaskFailed(task_id, first.kind, message)
        done = self.done
        assert done is not None, "the leader has answered"
        return TaskFinished(task_id, done.elapsed_s, done.results, done.cpu_s)


class Ledger:
    """The tasks in flight of an executor, by id."""

    def __init__(self) -> None:
        self._running: dict[int, Running] = {}

    def open(self, command: StartTask, token: int) -> Running:
        running = self._running[command.task_id] = Running(command, token, set(command.task.ranks))
        return running

    def find(self, task_id: int) -> Running | None:
        """None when it is over: an answer that comes too late counts for nothing."""
        return self._running.get(task_id)

    def is_open(self, running: Running) -> bool:
        return self._running.get(running.start.task_id) is running

    def close(self, running: Running) -> TaskFinished | TaskFailed | None:
        """The end of a task that every member has answered or left, told once; None before and after."""
        if running.pending or not self.is_open(running):
            return None
        del self._running[running.start.task_id]
        return running.end

    def waiting_for(self, rank: int) -> list[Running]:
        return [running for running in self._running.values() if rank in running.pending]

    @property
    def busy_ranks(self) -> set[int]:
        return {rank for running in self._running.values() for rank in running.pending}
