"""Images and videos with deadlines in one pool of 8 ranks, simulated: SAR of all, of images and of videos by policy.

`python benchmarks/video_pool.py [--seeds 5] [--processes 2] [--pool wan2.1-14b]`

Two pools: FLUX.1-dev beside Wan 2.2 TI2V-5B, and beside Wan 2.1 14B, by the bundled profiles, which are derived from
published times. Each is simulated at three loads: the share of the pool's time that requests take at their cheapest
degrees. Images have the paper's deadlines times 1.5, videos have 1.5 times what they take alone at degree 1. At the end
it says whether `lookahead` is first in every cell, and how far it is from the upper bound at the lower two loads.

The bound divides steps at will. A step of Wan 2.1 14B at 720p, two passes, takes 19.7 s at degree 1 and 3.7 s at degree
8, and a rank that runs one is not there for an image that can wait a second.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tetriserve.core.cost import stages_gpu_s
from tetriserve.policies.registry import POLICIES
from tetriserve.simulator.comparison import Comparison
from tetriserve.simulator.models import PooledModel, SimulatedModel
from tetriserve.simulator.scenario import Scenario, prepare
from tetriserve.simulator.study import Study
from tetriserve.workload.synthesis import Synthesis

POLICIES_SHOWN = ("lookahead", "tetriserve", "disaggregate", "edf-best-fit", "fcfs", "fixed:4", "srtf")
IMAGES = SimulatedModel(key="images", profile="flux.1-dev-8xh100", slo_scale=1.5)
MIX = "images:20,videos:1"
NEAR_BOUND = 0.03
POOLS = ("wan2.2-ti2v-5b", "wan2.1-14b")
"""By the model of videos."""
LOADS = (0.35, 0.55, 0.85)


@dataclass(frozen=True)
class Cell:
    """One pool at one load."""

    pool: str
    load: float
    scenario: Scenario
    comparison: Comparison

    @property
    def title(self) -> str:
        return f"{self.load:.0%}, {self.scenario.rate_per_min:g}/min"

    @property
    def bound(self) -> float:
        assert self.comparison.bound is not None
        return self.comparison.bound

    def sar(self, policy: str) -> float:
        return next(result.sar for result in self.comparison.results if result.policy == policy)


def scenario_at(pool: str, load: float, num_requests: int) -> Scenario:
    videos = SimulatedModel(key="videos", profile=f"{pool}-8xh100", slo_multiple=1.5)
    scenario = Scenario(models=(IMAGES, videos), mix=MIX, num_requests=num_requests)
    setting = prepare(scenario)
    assert isinstance(setting.source, Synthesis)
    weights = {portion.model: portion.weight for portion in setting.source.portions}
    mean_s = sum(weights[model.key] * least_s(model) for model in setting.models) / sum(weights.values())
    return replace(scenario, rate_per_min=float(f"{60 * load * setting.num_ranks / mean_s:.3g}"))


def least_s(model: PooledModel) -> float:
    """Rank-seconds of a request, mean over the sizes, each stage at its cheapest degree."""
    return fmean(stages_gpu_s(model.cost, request, request.stages) for request in model.probes)


def table_of(cells: Sequence[Cell]) -> Table:
    """A row per policy; a column per load of one pool, in percent: all, images, videos."""
    table = Table(title=f"{cells[0].pool}: SAR in percent of all, of images, of videos", title_justify="left")
    table.add_column("policy", no_wrap=True)
    for cell in cells:
        table.add_column(cell.title, justify="right", no_wrap=True)
    for row in zip(*(cell.comparison.results for cell in cells), strict=True):
        best = [
            result.sar == max(other.sar for other in cell.comparison.results)
            for result, cell in zip(row, cells, strict=True)
        ]
        table.add_row(
            row[0].policy,
            *(percents(result.sar, result.sar_by_model, is_bold) for result, is_bold in zip(row, best, strict=True)),
        )
    table.add_section()
    table.add_row("upper bound", *(percents(cell.bound, cell.comparison.bound_by_model or {}, False) for cell in cells))
    return table


def percents(sar: float, by_model: dict[str, float], is_bold: bool) -> str:
    text = "  ".join(f"{100 * ratio:5.1f}" for ratio in (sar, by_model["images"], by_model["videos"]))
    return f"[bold]{text}[/bold]" if is_bold else text


def check(cells: Sequence[Cell]) -> dict[str, bool]:
    """The bars and whether each is kept."""
    kept = {}
    for cell in cells:
        ours = cell.sar("lookahead")
        best = max(result.sar for result in cell.comparison.results)
        kept[f"{cell.pool}, {cell.title}: lookahead first ({100 * ours:.1f} of {100 * best:.1f})"] = ours >= best
        if cell.load != max(LOADS):
            short = cell.bound - ours
            kept[f"{cell.pool}, {cell.title}: lookahead within 3 points of the bound ({100 * short:.1f} below)"] = (
                short <= NEAR_BOUND
            )
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=100, help="the policies were developed on seeds below 100")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pool", choices=POOLS, action="append", help="one of the pools; all by default")
    options = parser.parse_args()

    policies = [name for name in POLICIES_SHOWN if name.partition(":")[0] in POLICIES]
    pools = options.pool or list(POOLS)
    named = [(pool, load, scenario_at(pool, load, options.requests)) for pool in pools for load in LOADS]
    console = Console(highlight=False, width=120)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating")

        def on_progress(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        seeds = range(options.first_seed, options.first_seed + options.seeds)
        with Study(seeds, num_processes=options.processes, on_progress=on_progress) as study:
            comparisons = study.compare([scenario for *_, scenario in named], policies)
    cells = [Cell(*described, comparison) for described, comparison in zip(named, comparisons, strict=True)]
    for pool in pools:
        console.print(table_of([cell for cell in cells if cell.pool == pool]))
    for text, is_kept in check(cells).items():
        console.print(f"{'yes' if is_kept else 'NO ':4} {text}", markup=False)


if __name__ == "__main__":
    main()
