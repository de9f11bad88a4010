"""Traces for ui.perfetto.dev and chrome://tracing: a row per rank, a block per task, deadlines below.

Chrome's trace event format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tetriserve.core.events import Run
from tetriserve.core.request import Shape
from tetriserve.workload.outcome import Outcome

TraceEvent = dict[str, object]

_PROCESS = 0


def chrome_trace(outcomes: Iterable[Outcome], num_ranks: int, title: str) -> dict[str, object]:
    """A run as a document in Chrome's trace event format; its times are microseconds.

    A block is named by request and degree. Deadlines are instant events on a row of their own, below the ranks.
    """
    events = (event for outcome in outcomes for event in (*_blocks_of(outcome), deadline_mark(outcome, num_ranks)))
    return trace_document(events, num_ranks, title)


def trace_document(events: Iterable[TraceEvent], num_ranks: int, title: str) -> dict[str, object]:
    """`events` with the names of their rows."""
    return {"displayTimeUnit": "ms", "traceEvents": [*_rows(num_ranks, title), *events]}


def task_blocks(run: Run, shape: Shape, **arguments: object) -> Iterator[TraceEvent]:
    """One task, once on the row of each of its ranks. `arguments` are shown when the block is selected."""
    task = run.task
    shared = {"batch": task.batch} if task.batch > 1 else {}
    for rank in task.ranks:
        yield {
            "ph": "X",
            "name": f"{' + '.join(task.members)} x{task.degree}",
            "cat": task.stage,
            "pid": _PROCESS,
            "tid": rank,
            "ts": run.start_s * 1e6,
            "dur": (run.end_s - run.start_s) * 1e6,
            "args": {"stage": task.stage, "size": str(shape), "steps": task.num_steps, **shared, **arguments},
        }


def deadline_mark(outcome: Outcome, row: int) -> TraceEvent:
    """The deadline of an ended request, on row `row`."""
    request = outcome.request
    return {
        "ph": "i",
        "name": f"{request.request_id} {'attained' if outcome.is_attained else 'missed'}",
        "cat": "deadline",
        "s": "t",
        "pid": _PROCESS,
        "tid": row,
        "ts": request.deadline_s * 1e6,
        "args": {"size": str(request.shape), "arrival_s": request.arrival_s, "finish_s": outcome.finish_s},
    }


def _blocks_of(outcome: Outcome) -> Iterator[TraceEvent]:
    for run in outcome.runs:
        if run.task.members[0] == outcome.request.request_id:  # those who shared it are named in its one block
            yield from task_blocks(run, outcome.request.shape, attained=outcome.is_attained)


def _rows(num_ranks: int, title: str) -> Iterator[TraceEvent]:
    yield {"ph": "M", "name": "process_name", "pid": _PROCESS, "args": {"name": title}}
    for row, name in enumerate((*(f"rank {rank}" for rank in range(num_ranks)), "deadlines")):
        yield {"ph": "M", "name": "thread_name", "pid": _PROCESS, "tid": row, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": _PROCESS, "tid": row, "args": {"sort_index": row}}
