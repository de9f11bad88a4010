"""What became of one request: the one result schema, written as JSON Lines by the live server and the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from tetriserve.core.events import Run, TextCount
from tetriserve.core.request import Request


class Status(StrEnum):
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Times are seconds since the engine started; `predicted_finish_s` was predicted when the request was admitted."""

    request: Request
    status: Status
    runs: tuple[Run, ...]
    predicted_finish_s: float
    finish_s: float
    message: str = ""

    @property
    def is_attained(self) -> bool:
        return self.status is Status.FINISHED and self.finish_s <= self.request.deadline_s

    @property
    def latency_s(self) -> float:
        return self.finish_s - self.request.arrival_s

    @property
    def queued_s(self) -> float:
        """Seconds in which no task ran for the request, before its first one and between tasks."""
        return self.latency_s - sum(run.end_s - run.start_s for run in self.runs)

    @property
    def gpu_time_s(self) -> float:
        """Rank-seconds occupied: the sum over tasks of duration times degree, its share of those that it shared."""
        return sum((run.end_s - run.start_s) * run.task.degree / run.task.batch for run in self.runs)

    @property
    def degrees(self) -> tuple[int, ...]:
        """The degree of every denoise step, in order."""
        return tuple(run.task.degree for run in self._denoise_runs() for _ in range(run.task.num_steps))

    @property
    def text(self) -> TextCount | None:
        """What encoding counted; None for a request that was not encoded."""
        return next((run.text for run in self.runs if run.text is not None), None)

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of every denoise step, in order."""
        return tuple(run.task.ranks for run in self._denoise_runs() for _ in range(run.task.num_steps))

    def _denoise_runs(self) -> Sequence[Run]:
        return [run for run in self.runs if run.task.num_steps]

    def as_json(self) -> dict[str, object]:
        """One line of a result file. The prompt is left out: results are shared, prompts are not."""
        request = self.request
        return {
            "request_id": request.request_id,
            "model": request.model,
            "status": self.status.value,
            "height": request.shape.height,
            "width": request.shape.width,
            "frames": request.shape.frames,
            "num_steps": request.num_steps,
            "seed": request.seed,
            "priority": request.priority,
            "arrival_s": request.arrival_s,
            "deadline_s": request.deadline_s,
            "finish_s": self.finish_s,
            "predicted_finish_s": self.predicted_finish_s,
            "attained": self.is_attained,
            "latency_s": self.latency_s,
            "queued_s": self.queued_s,
            "gpu_time_s": self.gpu_time_s,
            "degrees": list(self.degrees),
            "ranks": [list(ranks) for ranks in self.ranks],
            "message": self.message,
        }
