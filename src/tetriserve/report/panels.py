"""Figures and sheets that both the paper's evaluation and a report on one comparison have.

Mappings go from a panel's title to what it shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tetriserve.report.board import board_sheet, busiest_window, draw_board
from tetriserve.report.charts import add_legend, draw_courses, draw_latencies
from tetriserve.report.exhibit import Cell, Column, Exhibit, Sheet
from tetriserve.report.style import canvas
from tetriserve.report.windows import Points
from tetriserve.simulator.comparison import Comparison
from tetriserve.workload.outcome import Outcome
from tetriserve.workload.percentiles import percentile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BOARD_CAPTION = (
    "A row per GPU, a block per task, a colour per request with its height in pixels, and the frames of a video; "
    "hatched requests missed their deadlines."
)
PERCENTS = (5, 10, 25, 50, 75, 90, 95, 99, 100)


def latency_figure(comparisons: Mapping[str, Comparison]) -> Figure:
    """A panel per mix."""
    figure = canvas(4.8 * len(comparisons) + 1, 3.4)
    for number, (title, comparison) in enumerate(comparisons.items()):
        axes = figure.add_subplot(1, len(comparisons), number + 1)
        draw_latencies(axes, comparison)
        axes.set(title=title, ylabel="share of finished requests" if number == 0 else "")
    add_legend(figure)
    return figure


def latency_sheet(comparisons: Mapping[str, Comparison]) -> Sheet:
    """Percentiles of latency in seconds, a row per panel and policy."""
    columns = (Column("policy"), *(Column(f"p{percent} s", ".2f") for percent in PERCENTS))
    return _by_panel(
        columns,
        {
            title: [
                (result.policy, *(percentile(result.latencies_s, percent) for percent in PERCENTS))
                for result in comparison.results
            ]
            for title, comparison in comparisons.items()
        },
    )


def course_figure(courses: Mapping[str, Mapping[str, Points]], ylabel: str) -> Figure:
    """A panel per mix, a line per policy."""
    figure = canvas(4.8 * len(courses) + 1, 3.2)
    for number, (title, of_mix) in enumerate(courses.items()):
        axes = figure.add_subplot(1, len(courses), number + 1)
        draw_courses(axes, of_mix)
        axes.set(title=title, ylabel=ylabel if number == 0 else "")
        axes.set_ylim(bottom=0, top=1.02 if ylabel == "SAR" else None)
    add_legend(figure)
    return figure


def course_sheet(courses: Mapping[str, Mapping[str, Points]], ylabel: str) -> Sheet:
    """A row per panel and moment, a column per policy."""
    policies = list(dict.fromkeys(policy for of_panel in courses.values() for policy in of_panel))
    columns = (Column("time s", ".0f"), *(Column(f"{ylabel} {policy}", ".3f") for policy in policies))
    rows: dict[str, list[tuple[Cell, ...]]] = {}
    for title, of_panel in courses.items():
        values = {policy: dict(points) for policy, points in of_panel.items()}
        times = dict.fromkeys(time_s for points in of_panel.values() for time_s, _ in points)
        rows[title] = [(time_s, *(values.get(policy, {}).get(time_s) for policy in policies)) for time_s in times]
    return _by_panel(columns, rows)


def board_exhibit(
    boards: Mapping[str, Sequence[Outcome]],
    num_ranks: int,
    *,
    title: str,
    command: str,
    source: str = (
        "The half minute of the first seed in which most requests arrive. The command writes all of the first policy's "
        "run for ui.perfetto.dev."
    ),
) -> Exhibit:
    """A board per policy, one above the other, of the seconds in which most requests arrive.

    Args:
        source: where the blocks come from, in sentences.
    """
    window = busiest_window([outcome.request for outcome in next(iter(boards.values()))])
    figure = canvas(10.6, 0.7 + 2.1 * len(boards))
    first = None
    for number, (policy, outcomes) in enumerate(boards.items()):
        first = axes = figure.add_subplot(len(boards), 1, number + 1, sharex=first)
        draw_board(axes, outcomes, num_ranks, window)
        axes.set_title(policy)
    figure.axes[-1].set_xlabel("time, s")
    return Exhibit(
        name="board",
        title=title,
        caption=f"{BOARD_CAPTION} {source}",
        command=command,
        sheet=board_sheet(boards, window),
        figure=figure,
        is_long=True,
    )


def _by_panel(columns: tuple[Column, ...], rows: Mapping[str, Sequence[tuple[Cell, ...]]]) -> Sheet:
    """One sheet of all panels; with more than one of them, the first column says which."""
    if len(rows) == 1:
        return Sheet(columns, tuple(*rows.values()))
    return Sheet(
        (Column("panel"), *columns), tuple((title, *row) for title, of_panel in rows.items() for row in of_panel)
    )


def latency_exhibit(
    comparison: Comparison, command: str, span: str = "from arrival to result, over all seeds"
) -> Exhibit:
    """The distribution of latency. span: what it counts, in words."""
    return Exhibit(
        name="latency",
        title="Latency",
        caption=f"Share of finished requests that took at most so long, {span}.",
        command=command,
        sheet=latency_sheet({"": comparison}),
        figure=latency_figure({"": comparison}),
    )
