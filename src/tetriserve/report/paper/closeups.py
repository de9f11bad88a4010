"""One cell of the evaluation looked at closely: figures 9, 10 and 11 of the paper, and the board."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tetriserve.report.exhibit import Exhibit
from tetriserve.report.panels import board_exhibit, course_figure, course_sheet, latency_figure, latency_sheet
from tetriserve.report.paper.experiment import MIXES, TYPICAL_RATE, TYPICAL_SCALE, Experiment, best_fixed
from tetriserve.report.windows import Points, RunOutcomes, degree_over_time, sar_over_time
from tetriserve.simulator.scenario import prepare

_CELL = f"{TYPICAL_RATE:g} per minute, SLO scale {TYPICAL_SCALE:g}"


def latencies(experiment: Experiment) -> Exhibit:
    """Figure 9."""
    cells = [experiment.cell(mix, TYPICAL_RATE, TYPICAL_SCALE) for mix in MIXES]
    comparisons = dict(zip((f"{mix} mix" for mix in MIXES), experiment.compare(cells), strict=True))
    return Exhibit(
        name="figure-09-latency",
        title="Figure 9 · Latency",
        caption=f"Share of finished requests that took at most so long, from arrival to image, at {_CELL}.",
        command=experiment.command(cells[0]),
        sheet=latency_sheet(comparisons),
        figure=latency_figure(comparisons),
    )


def attainment_courses(experiment: Experiment) -> Exhibit:
    """Figure 10."""
    return _courses(
        experiment,
        sar_over_time,
        name="figure-10-sar-over-time",
        title="Figure 10 · SAR over time",
        caption=f"SAR of the requests that arrive around a moment, all seeds together, at {_CELL}.",
        ylabel="SAR",
    )


def degree_courses(experiment: Experiment) -> Exhibit:
    """Figure 11."""
    return _courses(
        experiment,
        degree_over_time,
        name="figure-11-degree-over-time",
        title="Figure 11 · Mean degree over time",
        caption=(
            f"How many GPUs a running denoise task has, on average around a moment, all seeds together, at {_CELL}. "
            "Policies that choose degrees narrow them when requests crowd."
        ),
        ylabel="mean degree",
    )


def board(experiment: Experiment) -> Exhibit:
    """The same seconds of the same workload under three policies."""
    cell = experiment.cell("skewed", TYPICAL_RATE, TYPICAL_SCALE)
    fixed = best_fixed(experiment.compare([cell], experiment.fixed, has_bound=False)[0]).policy
    runs = experiment.study.outcomes(cell, (fixed, "tetriserve", "lookahead"))
    boards = {policy: of_policy[0] for policy, of_policy in runs.items()}
    return board_exhibit(
        boards,
        prepare(cell).num_ranks,
        title="The board · GPUs over time",
        command=f"{experiment.command(cell, tuple(boards))} --trace-out board.json",
    )


def _courses(
    experiment: Experiment,
    measure: Callable[[Sequence[RunOutcomes]], Points],
    *,
    name: str,
    title: str,
    caption: str,
    ylabel: str,
) -> Exhibit:
    cells = [experiment.cell(mix, TYPICAL_RATE, TYPICAL_SCALE) for mix in MIXES]
    courses = {}
    for cell, comparison in zip(cells, experiment.compare(cells, experiment.fixed, has_bound=False), strict=True):
        policies = (best_fixed(comparison).policy, *experiment.others)
        runs = experiment.study.outcomes(cell, policies)
        courses[f"{cell.mix} mix"] = {policy: measure(runs[policy]) for policy in policies}
    return Exhibit(
        name=name,
        title=title,
        caption=f"{caption} Of the fixed degrees, the best.",
        command=f"{experiment.command(cells[0])} --out outcomes.jsonl",
        sheet=course_sheet(courses, ylabel),
        figure=course_figure(courses, ylabel),
    )
