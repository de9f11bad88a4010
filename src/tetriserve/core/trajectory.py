"""How far a request has come through its stages."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tetriserve.core.request import Request, Stage


@dataclass(frozen=True, slots=True)
class Trajectory:
    """How far one request has come.

    stage_index: of the stage that runs now or comes next, in `Request.stages`; their number when all are over.
    steps_done: of all stages.
    stage_steps_done: of the present stage.
    holders: the ranks that hold its current state in memory, the last task's leader first. They are a hint for
        placement only: a rank that lacks the state loads the copy that the last task left in the store.
    lost_degree: of the task that was lost since, with its workers; 0 if none was.
    is_apart: it shares no task: the request asks for exact bits, or a task that it shared has failed.
    """

    request: Request
    stage_index: int = 0
    steps_done: int = 0
    stage_steps_done: int = 0
    holders: tuple[int, ...] = ()
    is_running: bool = False
    lost_degree: int = 0
    is_apart: bool = False

    @classmethod
    def at(cls, request: Request, stage_index: int, stage_steps_done: int = 0) -> Trajectory:
        """One that stands at a stage, after some of its steps, or all; those before it went as long as they may."""
        before = sum(stage.num_steps for stage in request.stages[:stage_index])
        at = cls(request, stage_index, before, is_apart=request.is_exact)
        return at.after(stage_steps_done, is_stage_over=0 < stage_steps_done == at.remaining_steps)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def stage(self) -> Stage:
        """The stage that runs now or comes next."""
        return self.request.stages[self.stage_index]

    @property
    def last_kind(self) -> str:
        """Kind of the stage that its last finished task was of; empty if there was none."""
        index = self.stage_index if self.stage_steps_done else self.stage_index - 1
        return self.request.stages[index].kind if index >= 0 else ""

    @property
    def is_over(self) -> bool:
        return self.stage_index == len(self.request.stages)

    @property
    def is_short(self) -> bool:
        """Whether the present stage is one task, without steps."""
        return self.stage.num_steps == 0

    @property
    def has_started(self) -> bool:
        return self.is_running or self.stage_index > 0 or self.steps_done > 0

    @property
    def remaining_steps(self) -> int:
        """Of the present stage if it has steps, else of the next one that has; 0 if there is none."""
        for stage in self.request.stages[self.stage_index :]:
            if stage.num_steps:
                return stage.num_steps - self.stage_steps_done
        return 0

    def after(self, num_steps: int, *, is_stage_over: bool) -> Trajectory:
        """This one when a task has done `num_steps` steps of the present stage, or all of it."""
        steps_done = self.steps_done + num_steps
        if is_stage_over:
            return replace(self, stage_index=self.stage_index + 1, steps_done=steps_done, stage_steps_done=0)
        return replace(self, steps_done=steps_done, stage_steps_done=self.stage_steps_done + num_steps)
