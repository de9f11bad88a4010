"""Drawings of comparisons on given axes. What they draw is in their arguments; how it looks is in `report.style`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from tetriserve.report.exhibit import UPPER_BOUND
from tetriserve.report.style import BOUND, RULE, look_of
from tetriserve.simulator.comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec
    from matplotlib.projections.polar import PolarAxes

_LEGEND_COLUMNS = 5
_CDF_POINTS = 400


def draw_sars(axes: Axes, xs: Sequence[float], comparisons: Sequence[Comparison], model: str = "") -> None:
    """SAR of every policy over `xs`, one comparison each; the upper bound as a dashed line.

    Args:
        model: of several: SARs and bounds are those of its requests, without intervals.
    """
    for results in zip(*(comparison.results for comparison in comparisons), strict=True):
        look = look_of(results[0].policy)
        sars = [result.sar_by_model[model] if model else result.sar for result in results]
        axes.plot(xs, sars, label=results[0].policy, **look.line)
        widths = [0.0 if model else result.sar_half_width or 0.0 for result in results]
        if look.is_featured and any(widths):
            low = [max(0.0, sar - width) for sar, width in zip(sars, widths, strict=True)]
            high = [min(1.0, sar + width) for sar, width in zip(sars, widths, strict=True)]
            axes.fill_between(xs, low, high, color=look.colour, alpha=0.15, linewidth=0)
    found = [(comparison.bound_by_model or {}).get(model) if model else comparison.bound for comparison in comparisons]
    bounds = [bound for bound in found if bound is not None]
    if len(bounds) == len(xs):
        axes.plot(xs, bounds, label=UPPER_BOUND, **BOUND.line)
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.set_ylim(0, 1.02)


def draw_latencies(axes: Axes, comparison: Comparison) -> None:
    """The share of finished requests whose latency is at most x, of every policy that finished any."""
    from matplotlib.ticker import LogLocator, NullLocator

    for result in comparison.results:
        ordered = result.latencies_s
        if not ordered:
            continue
        stride = max(1, len(ordered) // _CDF_POINTS)
        picked = sorted({*range(0, len(ordered), stride), len(ordered) - 1})
        axes.plot(
            [ordered[index] for index in picked],
            [(index + 1) / len(ordered) for index in picked],
            label=result.policy,
            drawstyle="steps-post",
            markevery=0.25,
            **look_of(result.policy).line,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("latency, s")


def add_radar(figure: Figure, place: SubplotSpec, comparison: Comparison) -> PolarAxes:
    """SAR of each size as a polygon per policy: the outer circle is 1."""
    axes = cast("PolarAxes", figure.add_subplot(place, projection="polar"))
    shapes = list(comparison.results[0].sar_by_shape)
    angles = [2 * math.pi * number / len(shapes) for number in range(len(shapes))]
    for result in comparison.results:
        look = look_of(result.policy)
        sars = [result.sar_by_shape[shape] for shape in shapes]
        axes.plot([*angles, angles[0]], [*sars, sars[0]], label=result.policy, clip_on=False, **look.line)
        if look.is_featured:
            axes.fill(angles, sars, color=look.colour, alpha=0.08, linewidth=0)
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.set_xticks(angles, [f"{shape.height}²" if shape.height == shape.width else str(shape) for shape in shapes])
    axes.set_ylim(0, 1)
    axes.set_rlabel_position(45)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], ["", "0.5", "", "1"])
    axes.tick_params(axis="y", labelsize=7)
    axes.spines["polar"].set_color(RULE)
    return axes


def draw_ranking(axes: Axes, comparison: Comparison, model: str = "") -> None:
    """SAR of every policy as a dot with its 95 % confidence interval, best on top; the upper bound as a line.

    Args:
        model: of several: SARs and bound are those of its requests, without intervals.
    """
    sars = {result.policy: result.sar_by_model[model] if model else result.sar for result in comparison.results}
    ordered = sorted(comparison.results, key=lambda result: sars[result.policy])
    for row, result in enumerate(ordered):
        look, sar = look_of(result.policy), sars[result.policy]
        axes.plot([0, sar], [row, row], color=look.colour, linewidth=1.5, alpha=0.4)
        axes.errorbar(sar, row, xerr=None if model else result.sar_half_width, capsize=2, **look.line)
        axes.text(1.04, row, f"{sar:.3f}", va="center")
    bound = (comparison.bound_by_model or {}).get(model) if model else comparison.bound
    if bound is not None:
        axes.axvline(bound, **BOUND.line)
        axes.text(bound, len(ordered) - 0.4, f"{UPPER_BOUND} {bound:.3f}", ha="center", va="bottom")
    axes.set_yticks(range(len(ordered)), [result.policy for result in ordered])
    axes.set_ylim(-0.6, len(ordered) - 0.5)
    axes.set_xlim(0, 1.02)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("SAR")


def draw_courses(axes: Axes, courses: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """A line over time per policy; points are (seconds, value), NaN where there is none."""
    for policy, points in courses.items():
        axes.plot(
            [time_s / 60 for time_s, _ in points],
            [value for _, value in points],
            label=policy,
            markevery=0.12 if any(math.isfinite(value) for _, value in points) else None,
            **look_of(policy).line,
        )
    axes.set_xlabel("time, minutes")


def add_legend(figure: Figure) -> None:
    """One legend for all axes, below them, each policy once."""
    found: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        columns = min(len(found), _LEGEND_COLUMNS)
        figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns)
