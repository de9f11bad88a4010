"""The report on one comparison: what `simulate` prints, with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tetriserve.report.charts import add_legend, add_radar, draw_ranking
from tetriserve.report.exhibit import Exhibit, comparison_sheet
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
