"""What happens to the controller (events) and what it asks for (commands): the whole language of the core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Stage
from tetriserve.core.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Name of a named set of tensors in the executor's store. Messages carry references, never tensors."""

    key: str
    num_bytes: int


class FailureKind(StrEnum):
    """Whose fault a failed task is."""

    STEP = "step"
    """The computation itself failed (NaN latents): running it again elsewhere would fail again."""
    MEMORY = "memory"
    """A rank ran out of memory: the request continues from its last copy, on other ranks or a fresh process."""
    LOST = "lost"
    """A worker of the group died or hung: the request continues from its last copy."""
    STORE = "store"
    """The tensor store had no room, or lost the request's copies: the host's trouble, which no worker can mend."""


@dataclass(frozen=True, slots=True)
class TextCount:
    """Tokens of a prompt as written, and whether a text encoder got fewer: the rest has no effect on the image."""

    num_tokens: int
    is_truncated: bool


@dataclass(frozen=True, slots=True)
class Run:
    """One task as it went for a request: a line in its history. `text` comes with the stage that reads it."""

    task: Task
    start_s: float
    end_s: float
    text: TextCount | None = None


States = Mapping[str, TensorRef]
"""A request's state in the store: what each kind of stage left last."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is there of a begun request: where it stands, its state in the store, and the tasks that led there.

    stage_index: of the stage that comes next or goes on, after `stage_steps_done` of its steps.
    """

    stage_index: int
    stage_steps_done: int
    states: States
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """A member's part of a task, which goes on from step `steps_done` of the stage at `stage_index`.

    states: what earlier tasks left; ranks that do not hold it load it from there.
    """

    request: Request
    stage_index: int
    steps_done: int
    states: States

    @property
    def trajectory(self) -> Trajectory:
        """Where the request stands when the task starts."""
        return Trajectory.at(self.request, self.stage_index, self.steps_done)


@dataclass(frozen=True, slots=True)
class Result:
    """What a task has done for one member.

    left: names what it left in the store, in place of what this kind of stage left before.
    num_steps: that it did; a stage may be over before all of its steps are.
    text: with the stage that reads it.
    """

    left: TensorRef
    num_steps: int
    is_stage_over: bool
    text: TextCount | None = None

    @classmethod
    def planned(cls, task: Task, stage: Stage, steps_done: int, left: TensorRef) -> Result:
        """Of a task that goes as planned, from step `steps_done` of its stage on."""
        return cls(left, task.num_steps, is_stage_over=steps_done + task.num_steps == stage.num_steps)


@dataclass(frozen=True, slots=True)
class Submitted:
    """A request is there.

    promised_finish_s: the finish that a quote forecast, if the request was admitted on its promise.
    checkpoint: where it goes on; None for the beginning.
    """

    request: Request
    promised_finish_s: float | None = None
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True, slots=True)
class Cancelled:
    request_id: str


@dataclass(frozen=True, slots=True)
class TaskFinished:
    """All ranks of the task are idle again.

    `elapsed_s` is the time the leader spent computing, transfers included. `results` are in the order of its members.
    `cpu_s` is how much of `elapsed_s` a processor ran the leader's thread; None where that says nothing, because
    another device computes or there are no real workers.
    """

    task_id: int
    elapsed_s: float
    results: tuple[Result, ...]
    cpu_s: float | None = None

    @classmethod
    def planned(cls, start: StartTask, elapsed_s: float, left: TensorRef) -> TaskFinished:
        """The end of a task that goes as planned, for want of workers: its members all leave `left`."""
        parts = [(work.request.stages[work.stage_index], work.steps_done) for work in start.work]
        return cls(start.task_id, elapsed_s, tuple([Result.planned(start.task, *part, left) for part in parts]))


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """The task is over without a result, and its surviving ranks are idle again."""

    task_id: int
    kind: FailureKind
    message: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The rank's process is gone. A task that it took part in ends with its own TaskFailed, once survivors are idle."""

    rank: int
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    rank: int


@dataclass(frozen=True, slots=True)
class StateLost:
    """What the last tasks left of a request is gone with its node, before a copy was made of it.

    The request goes on from step `steps_done` of the stage at `stage_index`, whose `states` are there. A task that runs
    for it meanwhile ends with a TaskFailed.
    """

    request_id: str
    stage_index: int
    steps_done: int
    states: States


@dataclass(frozen=True, slots=True)
class TimerFired:
    pass


Event = Submitted | Cancelled | TaskFinished | TaskFailed | WorkerLost | WorkerJoined | StateLost | TimerFired


@dataclass(frozen=True, slots=True)
class StartTask:
    """Run `task`; `work` is in the order of its members.

    joins_passes: all passes of a step in one forward of the model, instead of one after the other.
    """

    task_id: int
    task: Task
    work: tuple[Work, ...]
    joins_passes: bool = False


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Send TimerFired at this time; replaces any earlier wish."""

    time_s: float


@dataclass(frozen=True, slots=True)
class Output:
    """What a request asked for, in the store, and how it is written there."""

    ref: TensorRef
    media_type: str


@dataclass(frozen=True, slots=True)
class FinishRequest:
    """What was asked for is there: `output`. `predicted_finish_s` was predicted at admission."""

    request: Request
    runs: tuple[Run, ...]
    predicted_finish_s: float
    output: Output


@dataclass(frozen=True, slots=True)
class FailRequest:
    """The request ended without an output; `message` says why, for its client.

    kind: of the task that failed; None if none did.
    """

    request: Request
    runs: tuple[Run, ...]
    predicted_finish_s: float
    message: str
    kind: FailureKind | None


@dataclass(frozen=True, slots=True)
class CloseCancelled:
    """A cancelled request is over: the task that still ran for it, if one did, has ended."""

    request: Request
    runs: tuple[Run, ...]
    predicted_finish_s: float


@dataclass(frozen=True, slots=True)
class ForgetRequest:
    """No task of the request runs any more and none will: drop every copy of its state."""

    request_id: str


Command = StartTask | WakeAt | FinishRequest | FailRequest | CloseCancelled | ForgetRequest
