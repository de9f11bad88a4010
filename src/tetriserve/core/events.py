"""What happens to the controller (events) and what it asks for (commands): the whole language of the core."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tetriserve.core.plan import Task
from tetriserve.core.request import Request


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
    """One task as it went: a line in a request's history. `text` comes with encoding."""

    task: Task
    start_s: float
    end_s: float
    text: TextCount | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is there of an encoded request: where it stands, its state in the store, and the tasks that led there."""

    steps_done: int
    embeds: TensorRef
    latents: TensorRef | None
    runs: tuple[Run, ...]


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
    """All ranks of the task are idle again; `result` names what it left in the store.

    `elapsed_s` is the time the leader spent computing, transfers included. `text` comes with encoding. `cpu_s` is how
    much of `elapsed_s` a processor ran the leader's thread; None where that says nothing, because another device
    computes or there are no real workers.
    """

    task_id: int
    elapsed_s: float
    result: TensorRef
    text: TextCount | None = None
    cpu_s: float | None = None


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
class TimerFired:
    pass


Event = Submitted | Cancelled | TaskFinished | TaskFailed | WorkerLost | WorkerJoined | TimerFired


@dataclass(frozen=True, slots=True)
class StartTask:
    """Run `task` from step `steps_done`; ranks that lack the request's state load it from the references."""

    task_id: int
    task: Task
    request: Request
    steps_done: int
    embeds: TensorRef | None = None
    latents: TensorRef | None = None


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Send TimerFired at this time; replaces any earlier wish."""

    time_s: float


@dataclass(frozen=True, slots=True)
class FinishRequest:
    """The image is in the store under `pixels`. `predicted_finish_s` was predicted at admission."""

    request: Request
    runs: tuple[Run, ...]
    predicted_finish_s: float
    pixels: TensorRef


@dataclass(frozen=True, slots=True)
class FailRequest:
    """The request ended without an image; `message` says why, for its client.

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
