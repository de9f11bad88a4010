"""The list of exhibits, in the order of the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tetriserve.report.exhibit import Exhibit
from tetriserve.report.paper import closeups, gen_serve, gf_dit, sweeps, tables
from tetriserve.report.paper.experiment import Experiment


@dataclass(frozen=True, slots=True)
class ListedExhibit:
    """An exhibit to be made. `label` names it while it is."""

    label: str
    make: Callable[[Experiment], Exhibit]


EXHIBITS = (
    ListedExhibit("overview", tables.overview),
    ListedExhibit("figure 4", sweeps.fixed_degrees),
    ListedExhibit("figure 7", lambda experiment: sweeps.slo_scales(experiment, "uniform", 7)),
    ListedExhibit("figure 8", lambda experiment: sweeps.slo_scales(experiment, "skewed", 8)),
    ListedExhibit("figure 9", closeups.latencies),
    ListedExhibit("figure 10", closeups.attainment_courses),
    ListedExhibit("figure 11", closeups.degree_courses),
    ListedExhibit("board", closeups.board),
    ListedExhibit("figure 12", sweeps.smaller_pool),
    ListedExhibit("figure 13", sweeps.arrival_rates),
    ListedExhibit("figure 14", sweeps.homogeneous),
    ListedExhibit("figure 15", sweeps.step_granularity),
    ListedExhibit("table 3", tables.approximate_cache),
    ListedExhibit("table 5", tables.ablation),
    ListedExhibit("table 6", tables.exhaustive_search),
    ListedExhibit("GenServe", gen_serve.images_beside_videos),
    ListedExhibit("GF-DiT", gf_dit.gf_dit),
)
