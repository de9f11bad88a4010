"""How far durable requests have come, as the journal is told while they run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tetriserve.core.events import Checkpoint
from tetriserve.core.request import Request
from tetriserve.engine.observers import Observation
from tetriserve.engine.tasks import EndedTask
from tetriserve.executor.protocol import Executor
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

    def __init__(self, journal: Journal, executor: Executor) -> None:
        self._journal = journal
        self._executor = executor
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
            self._note_task(observation)

    def _note_task(self, ended: EndedTask) -> None:
        request_id, result = ended.request.request_id, ended.result
        course = self._courses.get(request_id)
        if course is None or result is None or (course.checkpoint and ended.step_s is None):
            return  # nobody's, or without a result, or the image itself
        run = moved_runs([ended.run], -course.arrival_s)
        if course.checkpoint is None:
            course.checkpoint = Checkpoint(0, result, None, run)
        else:
            runs = (*course.checkpoint.runs, *run)
            course.checkpoint = replace(course.checkpoint, steps_done=ended.steps_done, latents=result, runs=runs)
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
        self._journal.advance(request_id, course.num_starts, course.checkpoint, self._executor.read_state)
