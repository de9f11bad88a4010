"""GenServe's setting (arXiv 2604.04335): images and videos, each with deadlines, in one pool.

In its main experiment half of the requests are videos: it reports 94 % of the images and 32 % of the videos in time,
63 % of all. Its models, sizes and deadlines are not those of the profiles here.
"""

from __future__ import annotations

from dataclasses import replace

from tetriserve.report.charts import add_legend, draw_sars
from tetriserve.report.exhibit import Column, Exhibit, comparison_sheet
from tetriserve.report.paper.experiment import OURS, Experiment, at_load, result_of
from tetriserve.report.style import canvas
from tetriserve.simulator.comparison import Comparison
from tetriserve.simulator.models import SimulatedModel
from tetriserve.simulator.scenario import Scenario

IMAGES = SimulatedModel(key="images", profile="flux.1-dev-8xh100", slo_scale=1.5)
VIDEOS = SimulatedModel(key="videos", profile="wan2.2-ti2v-5b-8xh100", slo_multiple=1.5)
MIX = "images:1,videos:1"
LOADS = (0.5, 0.75, 1.0, 1.25)
"""Least GPU time of what arrives, over the pool's."""
POLICIES = ("fixed:4", "fcfs", "srtf", "edf-best-fit", *OURS)
_TYPICAL = 1.0


def images_beside_videos(experiment: Experiment) -> Exhibit:
    """SAR of all requests, of images and of videos, by load."""
    scenarios = [scenario_at(experiment.base, load) for load in LOADS]
    comparisons = experiment.compare(scenarios, POLICIES)
    figure = canvas(10.0, 3.4)
    for number, (title, model) in enumerate((("all", ""), ("images", "images"), ("videos", "videos")), 1):
        axes = figure.add_subplot(1, 3, number)
        draw_sars(axes, LOADS, comparisons, model)
        axes.set(title=title, xlabel="load", ylabel="SAR" if number == 1 else "")
    add_legend(figure)
    typical = LOADS.index(_TYPICAL)
    return Exhibit(
        name="genserve-images-beside-videos",
        title="GenServe · Images beside videos in one pool",
        caption=(
            "FLUX.1-dev and Wan 2.2 TI2V-5B on eight GPUs, half of the requests images and half videos, each size as "
            "often as the others; images have the base deadlines times 1.5, videos 1.5 times what they take alone at "
            "degree 1. A load of 1 is what the pool could do if every request ran at its cheapest degrees. There, of "
            f"all, of images and of videos: {_in_words(comparisons[typical])}. GenServe reports 63, 94 and 32 % in its "
            "main setting, with other models, sizes and deadlines."
        ),
        command=experiment.command(scenarios[typical], POLICIES),
        sheet=comparison_sheet(
            (Column("load", "g"), Column("per minute", "g")),
            [
                ((load, scenario.rate_per_min), comparison)
                for load, scenario, comparison in zip(LOADS, scenarios, comparisons, strict=True)
            ],
        ),
        figure=figure,
    )


def scenario_at(base: Scenario, load: float) -> Scenario:
    """`base` with this pool and its mix, at the rate that makes `load`."""
    return at_load(replace(base, models=(IMAGES, VIDEOS), mix=MIX, num_ranks=None), load)


def _in_words(comparison: Comparison) -> str:
    parts = []
    for policy in OURS:
        result = result_of(comparison, policy)
        by_model = result.sar_by_model
        parts.append(f"{policy} {result.sar:.0%}, {by_model['images']:.0%}, {by_model['videos']:.0%}")
    return "; ".join(parts)
