"""Messages between the executor and its workers: plain values over a pipe, one union per direction, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from tetriserve.core.events import FailureKind, Result, StartTask, TensorRef
from tetriserve.core.memory import RankMemory


@dataclass(frozen=True, slots=True)
class RunTask:
    """Do your part of a task. `token` is higher than those of all tasks before it."""

    start: StartTask
    token: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop what you hold of this request."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish and exit."""


ToWorker = RunTask | Forget | Stop


@dataclass(frozen=True, slots=True)
class PreviewBasis:
    """Names the matrix of `models.preview` of the model whose key is `model`."""

    model: str
    ref: TensorRef


@dataclass(frozen=True, slots=True)
class Ready:
    """The models are loaded and warm.

    preview_bases: those that this rank left.
    memory: what the rank holds.
    """

    preview_bases: tuple[PreviewBasis, ...] = ()
    memory: RankMemory = RankMemory()


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The worker cannot serve; it exits after this. `message` is one line for the operator."""

    message: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent from a thread of its own: the process is not stopped. `num_steps` counts steps since it started."""

    num_steps: int


@dataclass(frozen=True, slots=True)
class TaskDone:
    """`results` are the leader's, empty on other ranks. `cpu_s`: see `TaskFinished`."""

    task_id: int
    elapsed_s: float
    results: tuple[Result, ...] = ()
    cpu_s: float | None = None


@dataclass(frozen=True, slots=True)
class TaskError:
    """This rank's part of the task failed. LOST: a peer is gone. MEMORY: this rank is not to go on.

    `failed_at` is the host's monotonic clock: of several ranks' errors in one task the earliest is the cause.
    """

    task_id: int
    kind: FailureKind
    message: str
    failed_at: float


FromWorker = Ready | StartFailed | Heartbeat | TaskDone | TaskError
