"""What just ran, kept for a while to be looked at."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile

from tetriserve.core.events import Run, Work
from tetriserve.core.plan import State
from tetriserve.core.request import Request
from tetriserve.engine import EndedTask, LiveEngine, Observation
from tetriserve.server.slot import EngineSlot
from tetriserve.workload.outcome import Outcome
from tetriserve.workload.perfetto import TraceEvent, deadline_mark, task_blocks, trace_document

KEEP_S = 300.0
"""How long tasks and outcomes are kept: for as long as anybody can ask for, or a quiet server would grow for hours."""
MAX_TASKS = 10_000
"""Kept at most, and as many outcomes. Garbage collections of the oldest generation walk them, for up to 30 ms."""


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """Ended tasks and outcomes, latest first, and the state at `now`, in seconds since the engine started."""

    tasks: list[EndedTask]
    outcomes: list[Outcome]
    state: State
    now: float
    title: str

    def trace(self) -> dict[str, object]:
        """In Chrome's trace event format, tasks that still run included up to now."""
        known = {rank for ended in self.tasks for rank in ended.run.task.ranks}.union(self.state.ranks)
        num_ranks = 1 + max(known, default=-1)
        events: list[TraceEvent] = [event for ended in reversed(self.tasks) for event in _ended_blocks(ended)]
        events += _running_blocks(self.state, self.now)
        events += [deadline_mark(outcome, num_ranks) for outcome in reversed(self.outcomes)]
        return trace_document(events, num_ranks, self.title)


class RecentRuns:
    """The last tasks and outcomes of the slot's engine, without prompts."""

    def __init__(self, slot: EngineSlot) -> None:
        self._slot = slot
        self._tasks: deque[EndedTask] = deque(maxlen=MAX_TASKS)
        self._outcomes: deque[Outcome] = deque(maxlen=MAX_TASKS)
        self._silent: dict[str, Request] = {}
        slot.when_filled(self._attach)

    def last(self, seconds: float) -> Excerpt:
        """What ended in the last `seconds`, and what runs now.

        Raises:
            NotReady: the engine is not there yet.
        """
        engine = self._slot.require()
        now = engine.now
        since = now - seconds
        return Excerpt(
            tasks=list(takewhile(lambda ended: ended.run.end_s >= since, reversed(self._tasks))),
            outcomes=list(takewhile(lambda outcome: outcome.finish_s >= since, reversed(self._outcomes))),
            state=engine.state,
            now=now,
            title=engine.models.title,
        )

    def _attach(self, engine: LiveEngine) -> None:
        engine.subscribe(self._observe)

    def _observe(self, observation: Observation) -> None:
        match observation:
            case EndedTask():
                self._keep_task(observation)
            case Outcome():
                self._keep_outcome(observation)

    def _keep_task(self, ended: EndedTask) -> None:
        self._tasks.append(replace(ended, work=self._silent_work(ended.work), results=()))
        while self._tasks[0].run.end_s < ended.run.end_s - KEEP_S:
            self._tasks.popleft()

    def _keep_outcome(self, outcome: Outcome) -> None:
        request = self._without_prompts(outcome.request)
        del self._silent[request.request_id]
        self._outcomes.append(replace(outcome, request=request, runs=()))
        while self._outcomes[0].finish_s < outcome.finish_s - KEEP_S:
            self._outcomes.popleft()

    def _silent_work(self, work: tuple[Work, ...]) -> tuple[Work, ...]:
        return tuple([replace(one, request=self._without_prompts(one.request), states={}) for one in work])

    def _without_prompts(self, request: Request) -> Request:
        """One copy for all tasks of the request: what is kept for minutes lengthens every garbage collection."""
        request_id = request.request_id
        if request_id not in self._silent:
            self._silent[request_id] = replace(request, prompt="", negative_prompt=None)
        return self._silent[request_id]


def _ended_blocks(ended: EndedTask) -> Iterator[TraceEvent]:
    arguments: dict[str, object] = {"end": "finished" if ended.failure is None else ended.failure.value}
    arguments |= _model_of(ended.work[0].request)
    if ended.step_s is not None and ended.expected_step_s is not None:
        arguments |= {"step_ms": ended.step_s * 1000, "expected_step_ms": ended.expected_step_s * 1000}
    return task_blocks(ended.run, ended.work[0].request.shape, **arguments)


def _running_blocks(state: State, now: float) -> Iterator[TraceEvent]:
    requests = {trajectory.request_id: trajectory.request for trajectory in state.trajectories}
    for flight in state.in_flight:
        request = requests.get(flight.task.members[0])
        if request is not None:  # else it was cancelled, and its last task runs on
            run, arguments = Run(flight.task, flight.start_s, now), _model_of(request)
            yield from task_blocks(run, request.shape, end="running", expected_end_s=flight.end_s, **arguments)


def _model_of(request: Request) -> dict[str, object]:
    """Where there are several."""
    return {"model": request.model} if request.model else {}
