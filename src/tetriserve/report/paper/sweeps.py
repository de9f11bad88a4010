"""SAR against one thing that changes: figures 4, 7, 8, 12, 13, 14 and 15 of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tetriserve.core.cost import stages_gpu_s
from tetriserve.report.charts import add_legend, add_radar, draw_sars
from tetriserve.report.exhibit import Column, Exhibit, Sheet, comparison_sheet
from tetriserve.report.paper.experiment import (
    MIXES,
    RATES,
    SCALES,
    TYPICAL_RATE,
    TYPICAL_SCALE,
    Experiment,
    fixed_degrees_of,
    in_words,
)
from tetriserve.report.style import Dash, canvas, look_of
from tetriserve.simulator.comparison import Comparison
from tetriserve.simulator.scenario import Scenario, prepare

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALL_RATES = (6.0, 12.0, 18.0, 24.0, 30.0, 36.0)
FEW_SCALES = (1.0, 1.25, 1.5)
GRANULARITIES = (1, 2, 5, 10, 15)
SMALL_POOL = "qwen-image-4xh20"
MULTIPLES = (1.1, 1.25, 1.5, 1.75, 2.0)
LOAD = 0.6
"""Of a homogeneous workload: least GPU time of what arrives, over the pool's."""

_RATE = "requests per minute"
_SCALE = "SLO scale"
_PANEL_IN = (3.2, 2.6)


def fixed_degrees(experiment: Experiment) -> Exhibit:
    """Figure 4."""
    scenarios = [experiment.cell("uniform", rate, 1.0) for rate in ALL_RATES]
    comparisons = experiment.compare(scenarios, experiment.fixed)
    figure = canvas(8.0, 3.4)
    grid = figure.add_gridspec(1, 2, width_ratios=(1.5, 1))
    axes = figure.add_subplot(grid[0])
    draw_sars(axes, ALL_RATES, comparisons)
    axes.set(title="uniform mix, SLO scale 1", xlabel=_RATE, ylabel="SAR")
    add_radar(figure, grid[1], comparisons[1]).set_title("by size, at 12 per minute")
    add_legend(figure)
    return Exhibit(
        name="figure-04-fixed-degrees",
        title="Figure 4 · One fixed degree for all",
        caption=(
            "No single degree suits every size: narrow ones are late with large images, wide ones waste GPU time on "
            "small images and saturate first."
        ),
        command=experiment.command(scenarios[1], experiment.fixed),
        sheet=_sheet(scenarios, comparisons),
        figure=figure,
    )


def slo_scales(experiment: Experiment, mix: str, number: int) -> Exhibit:
    """Figures 7 and 8, each at several rates."""
    scenarios = [[experiment.cell(mix, rate, scale) for scale in SCALES] for rate in RATES]
    rows = [experiment.compare(row) for row in scenarios]
    figure = canvas(_PANEL_IN[0] * len(RATES), 5.6)
    grid = figure.add_gridspec(2, len(RATES))
    for column, (rate, comparisons) in enumerate(zip(RATES, rows, strict=True)):
        axes = figure.add_subplot(grid[0, column])
        draw_sars(axes, SCALES, comparisons)
        axes.set(title=f"{rate:g} per minute", xlabel=_SCALE, ylabel="SAR" if column == 0 else "")
        radar = add_radar(figure, grid[1, column], comparisons[SCALES.index(TYPICAL_SCALE)])
        radar.set_title(f"by size, scale {TYPICAL_SCALE:g}")
    add_legend(figure)
    typical = rows[RATES.index(TYPICAL_RATE)][SCALES.index(TYPICAL_SCALE)]
    return Exhibit(
        name=f"figure-{number:02}-slo-scale-{mix}",
        title=f"Figure {number} · SAR by SLO scale, {mix} mix",
        caption=(
            f"How many requests are in time as deadlines become looser, at three rates; below, by size at scale "
            f"{TYPICAL_SCALE:g}. At {TYPICAL_RATE:g} per minute and that scale: {in_words(typical)}. "
            "Bands are 95 % confidence intervals over seeds. The paper's rate is 12."
        ),
        command=experiment.command(experiment.cell(mix, TYPICAL_RATE, TYPICAL_SCALE)),
        sheet=_sheet(sum(scenarios, []), sum(rows, [])),
        figure=figure,
    )


def smaller_pool(experiment: Experiment) -> Exhibit:
    """Figure 12, with another model than the paper's."""
    base = replace(experiment.base, profile=SMALL_POOL, num_ranks=None, rate_per_min=6.0)
    policies = (*fixed_degrees_of(prepare(base)), *experiment.others)
    scenarios = [[replace(base, mix=mix, slo_multiple=multiple) for multiple in MULTIPLES] for mix in MIXES]
    rows = [experiment.compare(row, policies) for row in scenarios]
    figure = _panels(
        [f"{mix} mix" for mix in MIXES], MULTIPLES, rows, "deadline, multiple of the time alone at degree 1"
    )
    return Exhibit(
        name="figure-12-smaller-pool",
        title="Figure 12 · A smaller pool",
        caption=(
            "The paper shows Stable Diffusion 3 on four A40. There is no profile of that with measured times here, so "
            "this is Qwen-Image on four H20, with the step times that SJTU-Liquid/GF-DiT published, at 6 requests per "
            "minute. The base deadlines are out of its reach: deadlines are multiples of each size's own time."
        ),
        command=experiment.command(scenarios[0][2], policies),
        sheet=_sheet(sum(scenarios, []), sum(rows, [])),
        figure=figure,
    )


def arrival_rates(experiment: Experiment) -> Exhibit:
    """Figure 13."""
    scenarios = [[experiment.cell(mix, rate, TYPICAL_SCALE) for rate in ALL_RATES] for mix in MIXES]
    rows = [experiment.compare(row) for row in scenarios]
    return Exhibit(
        name="figure-13-arrival-rate",
        title="Figure 13 · SAR by arrival rate",
        caption=(
            f"From an idle pool to an overloaded one, SLO scale {TYPICAL_SCALE:g}. The paper's axis ends at 18 per "
            f"minute. At {ALL_RATES[-1]:g}, skewed: {in_words(rows[1][-1])}."
        ),
        command=experiment.command(scenarios[1][-1]),
        sheet=_sheet(sum(scenarios, []), sum(rows, [])),
        figure=_panels([f"{mix} mix" for mix in MIXES], ALL_RATES, rows, _RATE),
    )


def homogeneous(experiment: Experiment) -> Exhibit:
    """Figure 14."""
    setting = prepare(experiment.cell("uniform", TYPICAL_RATE, 1.0))
    cells = []
    for request in setting.probes:
        least_s = stages_gpu_s(setting.cost, request, request.stages)
        rate = float(f"{60 * LOAD * setting.num_ranks / least_s:.2g}")
        cells.append([experiment.cell(f"homogeneous:{request.shape}", rate, scale) for scale in FEW_SCALES])
    rows = [experiment.compare(row) for row in cells]
    titles = [f"{shape}, {row[0].rate_per_min:g}/min" for shape, row in zip(setting.shapes, cells, strict=True)]
    return Exhibit(
        name="figure-14-homogeneous",
        title="Figure 14 · Requests of one size only",
        caption=(
            f"Each size alone, at the rate that takes {LOAD:.0%} of the pool if every request ran at its cheapest "
            "degree. Where all requests are alike one fixed degree can do well; what is left to a scheduler is how "
            "wide each goes as the queue grows."
        ),
        command=experiment.command(cells[-1][1]),
        sheet=_sheet(sum(cells, []), sum(rows, [])),
        figure=_panels(titles, FEW_SCALES, rows, _SCALE),
    )


def step_granularity(experiment: Experiment) -> Exhibit:
    """Figure 15."""
    policies = [f"tetriserve:step_granularity={steps}" for steps in GRANULARITIES]
    cells = [experiment.cell(mix, rate, TYPICAL_SCALE) for mix in MIXES for rate in RATES]
    comparisons = experiment.compare(cells, policies, has_bound=False)
    figure = canvas(_PANEL_IN[0] * 2, _PANEL_IN[1] + 0.5)
    for number, mix in enumerate(MIXES):
        axes = figure.add_subplot(1, 2, number + 1)
        of_mix = [pair for pair in zip(cells, comparisons, strict=True) if pair[0].mix == mix]
        for (cell, comparison), marker, dash in zip(of_mix, "ovs", ("-", "--", ":"), strict=True):
            _draw_granularities(axes, comparison, f"{cell.rate_per_min:g} per minute", marker, dash)
        axes.set_xticks(range(len(GRANULARITIES)), [str(steps) for steps in GRANULARITIES])
        axes.set(title=f"{mix} mix", xlabel="steps of the largest size in a round", ylabel="SAR" if number == 0 else "")
        axes.set_ylim(0, 1.02)
    add_legend(figure)
    return Exhibit(
        name="figure-15-step-granularity",
        title="Figure 15 · Length of a round",
        caption=(
            "SAR of tetriserve by the number of steps of the largest size that a round spans, SLO scale "
            f"{TYPICAL_SCALE:g}; 5 is the paper's. By default it varies. Bars are 95 % confidence intervals over seeds."
        ),
        command=experiment.command(cells[1], policies),
        sheet=_sheet(cells, comparisons),
        figure=figure,
    )


def _panels(titles: Sequence[str], xs: Sequence[float], rows: Sequence[Sequence[Comparison]], xlabel: str) -> Figure:
    figure = canvas(max(8.6, 2.5 * len(rows)), _PANEL_IN[1] + 0.7)
    for number, (title, comparisons) in enumerate(zip(titles, rows, strict=True)):
        axes = figure.add_subplot(1, len(rows), number + 1)
        draw_sars(axes, xs, comparisons)
        axes.set(title=title, xlabel=xlabel, ylabel="SAR" if number == 0 else "")
    add_legend(figure)
    return figure


def _draw_granularities(axes: Axes, comparison: Comparison, label: str, marker: str, dash: Dash) -> None:
    axes.errorbar(
        range(len(comparison.results)),
        [result.sar for result in comparison.results],
        yerr=[result.sar_half_width or 0.0 for result in comparison.results],
        label=label, color=look_of("tetriserve").colour, marker=marker, linestyle=dash, capsize=2,
    )  # fmt: skip


def _sheet(cells: Sequence[Scenario], comparisons: Sequence[Comparison]) -> Sheet:
    """With a column for each thing that the cells differ in."""
    keys = [
        (Column(heading, form), field)
        for heading, form, field in (
            ("mix", "", "mix"),
            ("per minute", "g", "rate_per_min"),
            ("SLO scale", "g", "slo_scale"),
            ("SLO multiple", "g", "slo_multiple"),
        )
        if len({getattr(cell, field) for cell in cells}) > 1
    ]
    rows = [
        (tuple(getattr(cell, field) for _, field in keys), comparison)
        for cell, comparison in zip(cells, comparisons, strict=True)
    ]
    return comparison_sheet([column for column, _ in keys], rows)
