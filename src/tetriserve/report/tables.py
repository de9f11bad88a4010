"""A comparison of policies as a table for people and as JSON for programs."""

from __future__ import annotations

import math

from rich.table import Table

from tetriserve.simulator.comparison import Comparison, PolicyResult


def comparison_table(comparison: Comparison, title: str) -> Table:
    """One row per policy; the upper bound, where there is one, below them.

    SARs are of each size. Where several models share the pool they are of each model, and the median latency, which is
    that of the model asked for most, is left out: a terminal has 80 columns.
    """
    table = Table(title=title, title_justify="left")
    headings = comparison.models or tuple(map(str, comparison.results[0].sar_by_shape))
    median = () if comparison.models else ("p50 s",)
    table.add_column("policy", no_wrap=True)
    for heading in ("SAR", *headings, "mean s", *median, "p99 s", "GPU s"):
        table.add_column(heading, justify="right", no_wrap=True)
    best = max(result.sar for result in comparison.results)
    for result in comparison.results:
        spread = "" if result.sar_half_width is None else f" ± {result.sar_half_width:.3f}"
        table.add_row(
            result.policy,
            f"{result.sar:.3f}{spread}",
            *(f"{sar:.3f}" for sar in (result.sar_by_model if comparison.models else result.sar_by_shape).values()),
            f"{result.mean_latency_s:.2f}",
            *(f"{result.p50_latency_s:.2f}" for _ in median),
            f"{result.p99_latency_s:.2f}",
            f"{result.gpu_time_s:.0f}",
            style="bold" if result.sar == best else None,
        )
    if comparison.bound is not None:
        table.add_section()
        filler = " ± " + " " * 5 if comparison.num_seeds > 1 else ""
        by_model = (comparison.bound_by_model or {}).values()
        table.add_row(
            "upper bound", f"{comparison.bound:.3f}{' ' * len(filler)}", *(f"{bound:.3f}" for bound in by_model)
        )
    return table


def comparison_json(comparison: Comparison) -> dict[str, object]:
    """The same numbers, unrounded; bounds are null where they were not computed."""
    return {
        "num_seeds": comparison.num_seeds,
        "bound": comparison.bound,
        "bound_by_model": comparison.bound_by_model,
        "policies": [_result_json(result) for result in comparison.results],
    }


def _result_json(result: PolicyResult) -> dict[str, object]:
    return {
        "policy": result.policy,
        "sar": result.sar,
        "sar_half_width": result.sar_half_width,
        "sar_by_shape": {str(shape): sar for shape, sar in result.sar_by_shape.items()},
        "sar_by_model": {model: sar for model, sar in result.sar_by_model.items() if model},
        "mean_latency_s": _finite(result.mean_latency_s),
        "p50_latency_s": _finite(result.p50_latency_s),
        "p99_latency_s": _finite(result.p99_latency_s),
        "gpu_time_s": result.gpu_time_s,
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN, which latencies are where no request finished."""
    return value if math.isfinite(value) else None
