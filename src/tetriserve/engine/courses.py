"""How far durable requests have come, as the journal is told while they run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tetriserve.core.events import Checkpoint, Result, Run, Work
from tetriserve.core.request import Request
from tetriserve.core.states import StateStore
from tetriserve.engine.observers import Observation
from tetriserve.engine.tasks import EndedTask
from tetriserve.journal import Journal
from tetriserve.journal.times import moved_runs


@dataclass
class _Course:
    """As `journal.Course`, with times after `arrival_s`. is_started: a task of it was started in this life."""

    arrival_s: float
    num_starts: int
    checkpoint: Checkpoint | None
    is_started: bool = False


class Courses:
    """Those of the requests that are followed. Nothing here waits for a disk: the journal's thread does."""

    def __init__(self, journal: Journal, states: StateStore) -> None:
        self._journal = journal
        self._states = states
        self._courses: dict[str, _Course] = {}

    def follow(self, request: Request, num_starts: int = 0, checkpoint: Checkpoint | None = None) -> None:
        """Note how `request` comes along, from `checkpoint` on, whose times count from the request's arrival."""
        self._courses[request.request_id] = _Course(request.arrival_s, num_starts, checkpoint)

    def leave(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._courses.pop(request_id, None)

    def note_start(self, request_id: str) -> None:
        """A task of the request starts: should the server die of it, the next one knows."""
        course = self._courses.get(request_id)
        if course is not None and not course.is_started:
            course.is_started = True
            course.num_starts += 1
            self._note(request_id, course)

    def observe(self, observation: Observation) -> None:
        """What a task left in the store is copied from there soon, unless something newer comes first."""
        if isinstance(observation, EndedTask):
            for work, result in zip(observation.work, observation.results, strict=False):  # without, if it failed
                self._note_task(work, result, observation.run)

    def _note_task(self, work: Work, result: Result, run: Run) -> None:
        request_id = work.request.request_id
        course = self._courses.get(request_id)
        after = work.trajectory.after(result.num_steps, is_stage_over=result.is_stage_over)
        if course is None or after.is_over:
            return  # nobody's, or what it left is the output
        task = replace(run.task, num_steps=result.num_steps)
        before = () if course.checkpoint is None else course.checkpoint.runs
        course.checkpoint = Checkpoint(
            after.stage_index,
            after.stage_steps_done,
            {**work.states, task.stage: result.left},
            (*before, *moved_runs([replace(run, task=task, text=result.text)], -course.arrival_s)),
        )
        course.num_starts = 0
        self._note(request_id, course)

    def clear_starts(self, request_ids: Iterable[str]) -> None:
        """The server stops in good order: none of these brings it down."""
        for request_id in request_ids:
            course = self._courses.get(request_id)
            if course is not None and course.num_starts:
                course.num_starts = 0
                self._note(request_id, course)

    def _note(self, request_id: str, course: _Course) -> None:
        self._journal.advance(request_id, course.num_starts, course.checkpoint, self._states)
