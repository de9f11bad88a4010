"""The report on a bench run: a page with figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tetriserve.bench.attempt import Attempt
from tetriserve.bench.session import Measurement, Session
from tetriserve.bench.summary import GroupSummary, Summary, judged_attempts
from tetriserve.report.bench_table import bench_notes
from tetriserve.report.charts import add_legend
from tetriserve.report.exhibit import Cell, Column, Exhibit, Sheet
from tetriserve.report.page import render_page
from tetriserve.report.panels import board_exhibit, course_figure, course_sheet, latency_exhibit
from tetriserve.report.style import INK, MUTED, canvas, styled
from tetriserve.report.windows import degree_over_time, sar_over_time
from tetriserve.simulator.comparison import Comparison, PolicyTally
from tetriserve.workload.outcome import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ATTAINED, _LATE, _FAILED = "#009e73", "#e69f00", "#d55e00"
"""Colours of M. Okabe and K. Ito, as in `report.style`."""
_LEAST_SHARE = 0.01
_LEAST_ALLOWED_S = 0.001
"""A trace may allow no time at all."""


def render_bench(session: Session, measurement: Measurement, summary: Summary, *, title: str, command: str) -> str:
    """The page on one run.

    Args:
        title: what was sent where.
        command: what was typed.
    """
    attempts = judged_attempts(measurement)
    name = measurement.target.policy or measurement.target.model or str(session.address)
    runs = {name: [attempt.outcome for attempt in attempts]}
    with styled():
        exhibits = [
            _attainment(summary, command),
            _requests(attempts, command),
            _latency(runs, command),
            *_courses(runs, command),
        ]
        if measurement.target.num_ranks and any(outcome.runs for outcome in runs[name]):
            exhibits.append(
                board_exhibit(
                    runs,
                    measurement.target.num_ranks,
                    title="Ranks over time",
                    command=command,
                    source="The half minute in which most requests arrive, as the server's answers tell it, counted "
                    "from when each request was sent.",
                )
            )
        return render_page("Bench", [title, *bench_notes(summary, measurement)], exhibits)


def _attainment(summary: Summary, command: str) -> Exhibit:
    groups = {"all": summary.everything, **{str(shape): group for shape, group in summary.by_shape.items()}}
    figure = canvas(8.0, 1.2 + 0.36 * len(groups))
    axes = figure.add_subplot()
    left = [0.0] * len(groups)
    for label, colour, counts in (
        ("attained", _ATTAINED, [group.num_attained for group in groups.values()]),
        ("late", _LATE, [group.num_judged - group.num_attained - group.num_failed for group in groups.values()]),
        ("failed", _FAILED, [group.num_failed for group in groups.values()]),
    ):
        shares = [count / group.num_judged for count, group in zip(counts, groups.values(), strict=True)]
        axes.barh(range(len(groups)), shares, left=left, height=0.62, color=colour, label=label)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    for row, group in enumerate(groups.values()):
        axes.text(1.02, row, f"{group.sar:.3f} of {group.num_judged}", va="center")
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of requests")
    add_legend(figure)
    return Exhibit(
        name="sar",
        title="SLO attainment",
        caption="What became of the requests of each size, by the client's clock, network included.",
        command=command,
        sheet=_groups_sheet(groups),
        figure=figure,
    )


def _groups_sheet(groups: Mapping[str, GroupSummary]) -> Sheet:
    columns = (
        Column("size"),
        Column("requests", "d"),
        Column("failed", "d"),
        Column("SAR", ".3f"),
        *(Column(f"{name} s", ".3f") for name in ("mean", "p50", "p95", "p99")),
    )
    rows: list[tuple[Cell, ...]] = []
    for size, group in groups.items():
        times = group.latencies
        rows.append(
            (
                size,
                group.num_judged,
                group.num_failed,
                group.sar,
                times.mean_s,
                times.p50_s,
                times.p95_s,
                times.p99_s,
            )
        )
    return Sheet(columns, tuple(rows))


def _requests(attempts: Sequence[Attempt], command: str) -> Exhibit:
    figure = canvas(10.0, 3.6)
    _draw_requests(figure.add_subplot(), attempts)
    add_legend(figure)
    rows = tuple(
        (
            attempt.outcome.request.request_id,
            str(attempt.outcome.request.shape),
            attempt.outcome.request.arrival_s,
            attempt.lateness_s,
            attempt.outcome.request.deadline_s - attempt.outcome.request.arrival_s,
            attempt.outcome.latency_s,
            attempt.error,
        )
        for attempt in attempts
    )
    return Exhibit(
        name="requests",
        title="Every request",
        caption="Latency over the time allowed, by when the request was due: above 1 it was late.",
        command=command,
        sheet=Sheet(
            (
                Column("request"),
                Column("size"),
                Column("due s", ".3f"),
                Column("sent late s", ".4f"),
                Column("allowed s", ".3f"),
                Column("latency s", ".3f"),
                Column("error"),
            ),
            rows,
        ),
        figure=figure,
    )


def _draw_requests(axes: Axes, attempts: Sequence[Attempt]) -> None:
    for label, colour, marker, chosen in (
        ("attained", _ATTAINED, "o", [a for a in attempts if a.outcome.is_attained]),
        ("late", _LATE, "^", [a for a in attempts if a.error is None and not a.outcome.is_attained]),
        ("failed", _FAILED, "x", [a for a in attempts if a.error is not None]),
    ):
        if chosen:
            axes.plot(
                [attempt.outcome.request.arrival_s for attempt in chosen],
                [max(_LEAST_SHARE, _share_used(attempt.outcome)) for attempt in chosen],
                linestyle="",
                marker=marker,
                markersize=4,
                color=colour,
                label=label,
            )
    axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 2)))
    axes.annotate("deadline", (1, 1), (4, 0), ("axes fraction", "data"), "offset points", va="center", color=MUTED)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel("latency / time allowed")
    axes.set_xlabel("due, s")


def _share_used(outcome: Outcome) -> float:
    request = outcome.request
    return outcome.latency_s / max(_LEAST_ALLOWED_S, request.deadline_s - request.arrival_s)


def _latency(runs: Mapping[str, Sequence[Outcome]], command: str) -> Exhibit:
    tallies = {name: PolicyTally() for name in runs}
    for name, outcomes in runs.items():
        tallies[name].take_run(outcomes)
    comparison = Comparison(
        results=tuple(tally.result(name) for name, tally in tallies.items()), bound=None, num_seeds=1
    )
    return latency_exhibit(comparison, command, "from when they were due to the whole answer")


def _courses(runs: Mapping[str, Sequence[Outcome]], command: str) -> list[Exhibit]:
    found = [("sar-over-time", "SAR over time", "SAR", "SAR of the requests due around a moment.", sar_over_time)]
    if any(outcome.runs for outcomes in runs.values() for outcome in outcomes):
        words = "How many ranks a running denoise task has, on average around a moment, as the answers tell."
        found.append(("degree-over-time", "Mean degree over time", "mean degree", words, degree_over_time))
    exhibits = []
    for name, title, label, caption, course in found:
        courses = {"": {run: course([outcomes]) for run, outcomes in runs.items()}}
        exhibits.append(
            Exhibit(
                name=name,
                title=title,
                caption=caption,
                command=command,
                sheet=course_sheet(courses, label),
                figure=course_figure(courses, label),
            )
        )
    return exhibits
