"""A bench run as a table for people, and what else they should know of it."""

from __future__ import annotations

import math

from rich.table import Table

from tetriserve.bench.session import Measurement
from tetriserve.bench.summary import GroupSummary, Summary


def bench_table(summary: Summary) -> Table:
    """A row per size and one for all."""
    table = Table()
    table.add_column("size", no_wrap=True)
    for heading in ("requests", "failed", "SAR", "mean s", "p50 s", "p95 s", "p99 s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for shape, group in summary.by_shape.items():
        table.add_row(str(shape), *_cells(group))
    table.add_section()
    table.add_row("all", *_cells(summary.everything), style="bold")
    return table


def _cells(group: GroupSummary) -> list[str]:
    times = (group.latencies.mean_s, group.latencies.p50_s, group.latencies.p95_s, group.latencies.p99_s)
    sar = "" if math.isnan(group.sar) else f"{group.sar:.3f}"
    return [
        str(group.num_judged),
        str(group.num_failed),
        sar,
        *("" if math.isnan(time_s) else f"{time_s:.2f}" for time_s in times),
    ]


def bench_notes(summary: Summary, measurement: Measurement) -> list[str]:
    """What stands below the table, in lines: pace, punctuality, what went wrong."""
    lines = [
        f"{summary.throughput_per_s:.2f} pictures per second over {summary.duration_s:.1f} s",
        f"sends late by {1000 * summary.lateness_p50_s:.1f} ms (p50), {1000 * summary.lateness_p99_s:.1f} ms (p99), "
        f"{1000 * summary.lateness_max_s:.1f} ms at most; the bench took {summary.cpu_share:.1%} of a core",
    ]
    if measurement.is_interrupted:
        num_unsent = measurement.total - len(measurement.attempts)
        lines.append(
            f"interrupted: {num_unsent} of {measurement.total} not sent, "
            f"{summary.num_left_out} cut short before their deadlines and left out"
        )
    lines += [f"{fault.count} x {kind}: {fault.example}" for kind, fault in summary.errors.items()]
    return lines
