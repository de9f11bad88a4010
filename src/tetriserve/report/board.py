"""GPUs times time: a row per rank, a block per task, coloured by request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from tetriserve.core.events import Run
from tetriserve.core.request import Request, Shape
from tetriserve.report.exhibit import Cell, Column, Sheet
from tetriserve.report.style import INK, MUTED
from tetriserve.workload.outcome import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOW_S = 30.0

_LABEL_S = 0.9
_HUES = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#0077bb", "#d55e00", "#b5a642", "#44aa99", "#8f7fc0", "#c2b59b")


def busiest_window(requests: Sequence[Request]) -> tuple[float, float]:
    """The `WINDOW_S` seconds in which most requests arrive; the first of several, or the whole of a shorter run."""
    arrivals = sorted(request.arrival_s for request in requests)
    start_s = max(arrivals, key=lambda start: (sum(start <= other < start + WINDOW_S for other in arrivals), -start))
    start_s = max(0.0, min(start_s, arrivals[-1] + WINDOW_S / 2 - WINDOW_S))
    return start_s, start_s + WINDOW_S


def draw_board(axes: Axes, outcomes: Sequence[Outcome], num_ranks: int, window: tuple[float, float]) -> None:
    """What ran in `window`. Blocks of requests that missed their deadline are hatched.

    A block is as high as its ranks are adjacent, and names its size where it is long enough. Requests that share a task
    divide its block.
    """
    from matplotlib.patches import Rectangle

    start_s, end_s = window
    order = {outcome.request.request_id: number for number, outcome in enumerate(_by_arrival(outcomes))}
    for outcome, run in _inside(outcomes, window):
        number = order[outcome.request.request_id]
        lane = run.task.members.index(outcome.request.request_id)
        for first, num_ranks_high in _stretches(run.task.ranks):
            height = (num_ranks_high - 0.08) / run.task.batch
            axes.add_patch(
                Rectangle(
                    (run.start_s, first - 0.5 + 0.04 + lane * height),
                    run.end_s - run.start_s,
                    height,
                    facecolor=_HUES[number % len(_HUES)],
                    edgecolor="white" if outcome.is_attained else INK,
                    linewidth=0.4,
                    hatch=None if outcome.is_attained else "//////",
                )
            )
    for outcome, first_run, last_run in _labels(outcomes, window):
        low, height = max(_stretches(first_run.task.ranks), key=lambda stretch: stretch[1])
        axes.text(
            (max(start_s, first_run.start_s) + min(end_s, last_run.end_s)) / 2,
            low + (height - 1) / 2,
            _label(outcome.request.shape),
            ha="center", va="center", fontsize=6.5, color="#000000",
            bbox={"facecolor": "#ffffff", "alpha": 0.65, "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
    axes.set_xlim(start_s, end_s)
    axes.set_ylim(num_ranks - 0.5, -0.5)
    axes.set_yticks(range(num_ranks) if num_ranks <= 16 else range(0, num_ranks, num_ranks // 8))
    axes.set_ylabel("rank")
    axes.grid(visible=False)
    axes.tick_params(colors=MUTED)


def board_sheet(boards: Mapping[str, Sequence[Outcome]], window: tuple[float, float]) -> Sheet:
    """One row per task of each policy that ran in `window`."""
    columns = ("policy", "request", "size", "stage", "steps", "ranks", "start s", "end s", "deadline s", "attained")
    rows: list[tuple[Cell, ...]] = [
        (
            policy,
            outcome.request.request_id,
            str(outcome.request.shape),
            run.task.stage,
            run.task.num_steps,
            " ".join(map(str, sorted(run.task.ranks))),
            run.start_s,
            run.end_s,
            outcome.request.deadline_s,
            "yes" if outcome.is_attained else "no",
        )
        for policy, outcomes in boards.items()
        for outcome, run in _inside(outcomes, window)
    ]
    return Sheet(tuple(map(Column, columns)), tuple(rows))


def _by_arrival(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return sorted(outcomes, key=lambda outcome: outcome.request.arrival_s)


def _inside(outcomes: Sequence[Outcome], window: tuple[float, float]) -> Iterator[tuple[Outcome, Run]]:
    start_s, end_s = window
    for outcome in _by_arrival(outcomes):
        for run in outcome.runs:
            if run.start_s < end_s and run.end_s > start_s:
                yield outcome, run


def _labels(outcomes: Sequence[Outcome], window: tuple[float, float]) -> Iterator[tuple[Outcome, Run, Run]]:
    """For each stay of a request on the same ranks that is long enough to be written into: its first and last task."""
    for (outcome, _), stay in groupby(_inside(outcomes, window), lambda pair: (pair[0], frozenset(pair[1].task.ranks))):
        runs = [run for _, run in stay]
        visible_s = min(window[1], runs[-1].end_s) - max(window[0], runs[0].start_s)
        if visible_s >= _LABEL_S and all(
            later.start_s - earlier.end_s < 0.1 for earlier, later in zip(runs, runs[1:], strict=False)
        ):
            yield outcome, runs[0], runs[-1]


def _label(shape: Shape) -> str:
    return str(shape.height) if shape.frames == 1 else f"{shape.height}×{shape.frames}"


def _stretches(ranks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of adjacent ranks as (first, how many)."""
    for _, stretch in groupby(enumerate(sorted(ranks)), lambda pair: pair[1] - pair[0]):
        members = [rank for _, rank in stretch]
        yield members[0], len(members)
