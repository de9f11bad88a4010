"""The report on one comparison: what `simulate` prints, with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tetriserve.report.charts import add_legend, add_radar, draw_ranking
from tetriserve.report.exhibit import UPPER_BOUND, Cell, Column, Exhibit, Sheet, comparison_sheet
from tetriserve.report.page import render_page
from tetriserve.report.panels import board_exhibit, course_figure, course_sheet, latency_exhibit
from tetriserve.report.style import canvas, styled
from tetriserve.report.windows import degree_over_time, sar_over_time
from tetriserve.simulator.comparison import Comparison
from tetriserve.workload.outcome import Outcome

MAX_BOARDS = 3


def render_comparison(
    comparison: Comparison,
    first_runs: Mapping[str, Sequence[Outcome]],
    *,
    num_ranks: int,
    title: str,
    command: str,
) -> str:
    """The page on one comparison.

    Args:
        first_runs: the outcomes of every policy on the first seed; they make the courses and the boards.
        title: what was simulated.
        command: what was typed.
    """
    with styled():
        exhibits = (
            _attainment(comparison, command),
            *_by_model(comparison, command),
            latency_exhibit(comparison, command),
            *_courses(first_runs, command),
            board_exhibit(
                dict(list(first_runs.items())[:MAX_BOARDS]),
                num_ranks,
                title="GPUs over time",
                command=f"{command} --trace-out board.json",
            ),
        )
        return render_page("Policies compared", [title], exhibits)


def _attainment(comparison: Comparison, command: str) -> Exhibit:
    has_radar = len(comparison.results[0].sar_by_shape) > 2  # of fewer sizes it has no area
    figure = canvas(10.0 if has_radar else 6.0, max(3.4, 1.0 + 0.32 * len(comparison.results)))
    grid = figure.add_gridspec(1, 2 if has_radar else 1, width_ratios=(1.5, 1) if has_radar else None)
    draw_ranking(figure.add_subplot(grid[0]), comparison)
    if has_radar:
        add_radar(figure, grid[1], comparison)
        add_legend(figure)
    return Exhibit(
        name="sar",
        title="SLO attainment ratio",
        caption=(
            "The share of requests that finish by their deadline, over all seeds, and by size. Whiskers are 95 % "
            "confidence intervals."
        ),
        command=command,
        sheet=comparison_sheet((), [((), comparison)]),
        figure=figure,
    )


def _by_model(comparison: Comparison, command: str) -> list[Exhibit]:
    """SAR of each model apart; nothing where there is one."""
    models = comparison.models
    if len(models) < 2:
        return []
    figure = canvas(5.0 * len(models), max(3.4, 1.0 + 0.32 * len(comparison.results)))
    for number, model in enumerate(models, 1):
        axes = figure.add_subplot(1, len(models), number)
        draw_ranking(axes, comparison, model)
        axes.set_title(model, loc="left", pad=18)
    bounds = comparison.bound_by_model or {}
    rows: list[tuple[Cell, ...]] = [
        (result.policy, *(result.sar_by_model[model] for model in models)) for result in comparison.results
    ]
    return [
        Exhibit(
            name="sar-by-model",
            title="SLO attainment ratio of each model",
            caption=(
                "The share of each model's requests that finish by their deadline, over all seeds. A model's upper "
                "bound is that of its requests with the pool to themselves: no scheduler reaches all of them at once."
            ),
            command=command,
            sheet=Sheet(
                (Column("policy"), *(Column(f"SAR {model}", ".3f") for model in models)),
                (*rows, *([(UPPER_BOUND, *map(bounds.get, models))] if bounds else [])),
            ),
            figure=figure,
        )
    ]


def _courses(first_runs: Mapping[str, Sequence[Outcome]], command: str) -> list[Exhibit]:
    return [
        Exhibit(
            name=name,
            title=title,
            caption=caption,
            command=command,
            sheet=course_sheet(courses, label),
            figure=course_figure(courses, label),
        )
        for name, title, caption, label, courses in (
            (
                "sar-over-time",
                "SAR over time",
                "SAR of the requests that arrive around a moment, first seed.",
                "SAR",
                {"": {policy: sar_over_time([run]) for policy, run in first_runs.items()}},
            ),
            (
                "degree-over-time",
                "Mean degree over time",
                "How many GPUs a running denoise task has, on average around a moment, first seed.",
                "mean degree",
                {"": {policy: degree_over_time([run]) for policy, run in first_runs.items()}},
            ),
        )
    ]
