"""A comparison of policies as a table for people and as JSON for programs."""

from __future__ import annotations

import math

from rich.table import Table

from tetriserve.simulator.comparison import Comparison, PolicyResult


def comparison_table(comparison: Comparison, title: str) -> Table:
    """One row per policy; the upper bound, where there is one, below them."""
    table = Table(title=title, title_justify="left")
    shapes = list(comparison.results[0].sar_by_shape)
    table.add_column("policy", no_wrap=True)
    for heading in ("SAR", *map(str, shapes), "mean s", "p50 s", "p99 s", "GPU s"):
        table.add_column(heading, justify="right", no_wrap=True)
    best = max(result.sar for result in comparison.results)
    for result in comparison.results:
        spread = "" if result.sar_half_width is None else f" ± {result.sar_half_width:.3f}"
        table.add_row(
            result.policy,
            f"{result.sar:.3f}{spread}",
            *(f"{result.sar_by_shape[shape]:.3f}" for shape in shapes),
            f"{result.mean_latency_s:.2f}",
            f"{result.p50_latency_s:.2f}",
            f"{result.p99_latency_s:.2f}",
            f"{result.gpu_time_s:.0f}",
            style="bold" if result.sar == best else None,
        )
    if comparison.bound is not None:
        table.add_section()
        filler = " ± " + " " * 5 if comparison.num_seeds > 1 else ""
        table.add_row("upper bound", f"{comparison.bound:.3f}{' ' * len(filler)}")
    return table


def comparison_json(comparison: Comparison) -> dict[str, object]:
    """The same numbers, unrounded; `bound` is null where it was not computed."""
    return {
        "num_seeds": comparison.num_seeds,
        "bound": comparison.bound,
        "policies": [_result_json(result) for result in comparison.results],
    }


def _result_json(result: PolicyResult) -> dict[str, object]:
    return {
        "policy": result.policy,
        "sar": result.sar,
        "sar_half_width": result.sar_half_width,
        "sar_by_shape": {str(shape): sar for shape, sar in result.sar_by_shape.items()},
        "mean_latency_s": _finite(result.mean_latency_s),
        "p50_latency_s": _finite(result.p50_latency_s),
        "p99_latency_s": _finite(result.p99_latency_s),
        "gpu_time_s": result.gpu_time_s,
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN, which latencies are where no request finished."""
    return value if math.isfinite(value) else None
