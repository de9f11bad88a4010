"""The list of exhibits, in the order of the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tetriserve.report.exhibit import Exhibit
from tetriserve.report.paper import closeups, sweeps, tables
from tetriserve.report.paper.experiment import Experiment


@dataclass(frozen=True, slots=True)
class Entry:
    """An exhibit to be made. `label` names it while it is."""

    label: str
    make: Callable[[Experiment], Exhibit]


EXHIBITS = (
    Entry("overview", tables.overview),
    Entry("figure 4", sweeps.fixed_degrees),
    Entry("figure 7", lambda experiment: sweeps.slo_scales(experiment, "uniform", 7)),
    Entry("figure 8", lambda experiment: sweeps.slo_scales(experiment, "skewed", 8)),
    Entry("figure 9", closeups.latencies),
    Entry("figure 10", closeups.attainment_courses),
    Entry("figure 11", closeups.degree_courses),
    Entry("board", closeups.board),
    Entry("figure 12", sweeps.smaller_pool),
    Entry("figure 13", sweeps.arrival_rates),
    Entry("figure 14", sweeps.homogeneous),
    Entry("figure 15", sweeps.step_granularity),
    Entry("table 3", tables.approximate_cache),
    Entry("table 5", tables.ablation),
    Entry("table 6", tables.exhaustive_search),
)
