"""A request's life as a chain of stages: encode, `num_steps` denoise steps, decode."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from tetriserve.core.request import Request


class Stage(StrEnum):
    ENCODE = "encode"
    DENOISE = "denoise"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Trajectory:
    """How far one request has come.

    `holders` are the ranks that hold its current state in memory, the last task's leader first. They are a hint for
    placement only: a rank that lacks the state loads the copy that the last task left in the store. `lost_degree` is
    the degree of the task that was lost since, with its workers; 0 if none was.
    """

    request: Request
    is_encoded: bool = False
    steps_done: int = 0
    holders: tuple[int, ...] = ()
    is_running: bool = False
    lost_degree: int = 0

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def stage(self) -> Stage:
        """The stage that runs now or comes next."""
        if not self.is_encoded:
            return Stage.ENCODE
        return Stage.DENOISE if self.remaining_steps else Stage.DECODE

    @property
    def remaining_steps(self) -> int:
        return self.request.num_steps - self.steps_done

    def is_moved_by(self, ranks: Collection[int]) -> bool:
        """Whether a task on `ranks` would have to fetch the state, or to change the group that holds it."""
        return bool(self.holders) and set(self.holders) != set(ranks)

    def is_late(self, now: float) -> bool:
        return now > self.request.deadline_s
