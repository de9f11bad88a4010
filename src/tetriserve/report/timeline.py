"""A run as a trace for ui.perfetto.dev or chrome://tracing: a row per rank, a block per task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tetriserve.core.trajectory import Stage
from tetriserve.workload.outcome import Outcome

_PROCESS = 0


def chrome_trace(outcomes: Iterable[Outcome], num_ranks: int, title: str) -> dict[str, object]:
    """The run as a document in Chrome's trace event format; its times are microseconds.

    A block is named by request and degree. Deadlines are instant events on a row of their own, below the ranks.
    """
    return {"displayTimeUnit": "ms", "traceEvents": [*_rows(num_ranks, title), *_events(outcomes, num_ranks)]}


def _rows(num_ranks: int, title: str) -> Iterator[dict[str, object]]:
    yield {"ph": "M", "name": "process_name", "pid": _PROCESS, "args": {"name": title}}
    for row, name in enumerate((*(f"rank {rank}" for rank in range(num_ranks)), "deadlines")):
        yield {"ph": "M", "name": "thread_name", "pid": _PROCESS, "tid": row, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": _PROCESS, "tid": row, "args": {"sort_index": row}}


def _events(outcomes: Iterable[Outcome], deadline_row: int) -> Iterator[dict[str, object]]:
    for outcome in outcomes:
        request = outcome.request
        for run in outcome.runs:
            task = run.task
            for rank in task.ranks:
                yield {
                    "ph": "X",
                    "name": f"{request.request_id} x{task.degree}",
                    "cat": task.stage.value,
                    "pid": _PROCESS,
                    "tid": rank,
                    "ts": run.start_s * 1e6,
                    "dur": (run.end_s - run.start_s) * 1e6,
                    "args": {
                        "stage": task.stage.value,
                        "size": str(request.shape),
                        "steps": task.num_steps if task.stage is Stage.DENOISE else 0,
                        "attained": outcome.is_attained,
                    },
                }
        yield {
            "ph": "i",
            "name": f"{request.request_id} {'attained' if outcome.is_attained else 'missed'}",
            "cat": "deadline",
            "s": "t",
            "pid": _PROCESS,
            "tid": deadline_row,
            "ts": request.deadline_s * 1e6,
            "args": {"size": str(request.shape), "arrival_s": request.arrival_s, "finish_s": outcome.finish_s},
        }
