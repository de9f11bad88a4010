"""What the page is told of requests and tasks, as JSON. Never a prompt: whoever watches may be someone else."""

from __future__ import annotations

from itertools import islice
from math import isfinite

from tetriserve.core.events import Run
from tetriserve.core.forecast import Forecast
from tetriserve.core.plan import InFlight
from tetriserve.core.request import Request
from tetriserve.core.trajectory import Trajectory
from tetriserve.engine import EndedTask, Intake
from tetriserve.workload.outcome import Outcome

Row = dict[str, object]

MAX_PLANNED = 500
"""Tasks to come that are told: more than a screen can show apart."""
_PAUSE_S = 0.02


def model_row(intake: Intake) -> Row:
    """A model that is served, and its defaults. Rows of requests call it by `key`; `fps` and `frame_step` are there
    only if it makes videos.
    """
    card = intake.card
    row: Row = {
        "key": card.key,
        "name": card.name,
        "makes": "video" if card.makes_videos else "image",
        "sizes": [str(size) for size in intake.sizes],
        "num_steps": card.default_num_steps,
    }
    return row | {"fps": card.default_fps, "frame_step": card.frame_step} if card.makes_videos else row


def request_row(request: Request) -> Row:
    """`model` is there only if several are served, `fps` only if the request is for a video."""
    row: Row = {
        "id": request.request_id,
        "size": str(request.shape),
        "num_steps": request.num_steps,
        "arrival_s": seconds(request.arrival_s),
        "deadline_s": seconds(request.deadline_s),
    }
    if request.model:
        row["model"] = request.model
    if request.video is not None:
        row["fps"] = request.video.fps
    return row


def open_row(trajectory: Trajectory) -> Row:
    """A request that has not ended, and how far it is."""
    return {**request_row(trajectory.request), "steps_done": trajectory.steps_done}


def ended_row(outcome: Outcome) -> Row:
    return {
        **request_row(outcome.request),
        "status": outcome.status.value,
        "attained": outcome.is_attained,
        "finish_s": seconds(outcome.finish_s),
    }


def running_rows(flight: InFlight) -> list[Row]:
    """A task that runs; its end is the expected one."""
    return run_rows(Run(flight.task, flight.start_s, flight.end_s))


def ran_rows(ended: EndedTask) -> list[Row]:
    """A task that is over. `failure` is there only if it has no result."""
    rows = run_rows(ended.run)
    return rows if ended.failure is None else [{**row, "failure": ended.failure.value} for row in rows]


def plan_row(forecast: Forecast) -> Row:
    """Tasks to come, the first `MAX_PLANNED`, those of a request that follow each other on the same ranks as one."""
    rows: list[Row] = []
    last: dict[tuple[str, ...], tuple[Run, list[Row]]] = {}
    for run in islice((run for run in forecast.runs if run.start_s >= forecast.now), MAX_PLANNED):
        before = last.get(run.task.members)
        if before is not None and _continues(run, before[0]):
            of_run = before[1]
            for row in of_run:
                row["end_s"] = seconds(run.end_s)
        else:
            of_run = run_rows(run)
            rows += of_run
        last[run.task.members] = run, of_run
    finishes = {name: seconds(finish_s) for name, finish_s in forecast.finish_s.items() if isfinite(finish_s)}
    return {"runs": rows, "finishes": finishes}


def _continues(run: Run, before: Run) -> bool:
    is_same = (run.task.stage, run.task.ranks) == (before.task.stage, before.task.ranks)
    return is_same and run.start_s - before.end_s < _PAUSE_S


def run_rows(run: Run) -> list[Row]:
    """A row for each request that the task is for. `lane` of `lanes` is there only if there are several."""
    task = run.task
    rows: list[Row] = [
        {
            "id": request_id,
            "stage": task.stage,
            "ranks": task.ranks,
            "num_steps": task.num_steps,
            "start_s": seconds(run.start_s),
            "end_s": seconds(run.end_s),
        }
        for request_id in task.members
    ]
    if task.batch > 1:
        rows = [{**row, "lane": lane, "lanes": task.batch} for lane, row in enumerate(rows)]
    return rows


def seconds(time_s: float) -> float:
    """To a tenth of a millisecond: finer than any screen."""
    return round(time_s, 4)
