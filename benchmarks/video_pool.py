"""Images and videos with deadlines in one pool of 8 ranks, simulated: SAR of all, of images and of videos by policy.

`python benchmarks/video_pool.py [--seeds 5] [--processes 2] [--pool wan2.1-14b]`

Two pools: FLUX.1-dev beside Wan 2.2 TI2V-5B, and beside Wan 2.1 14B, by the bundled profiles, which are derived from
published times. Each is simulated at three loads, of which the last is above what the pool can do. Images have the
paper's deadlines times 1.5, videos have 1.5 times what they take alone at degree 1. At the end it says whether
`lookahead` is first in every cell, and how far it is from the upper bound at the lower two loads.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tetriserve.policies.registry import POLICIES
from tetriserve.simulator.comparison import Comparison
from tetriserve.simulator.models import SimulatedModel
from tetriserve.simulator.scenario import Scenario
from tetriserve.simulator.study import Study

POLICIES_SHOWN = ("lookahead", "tetriserve", "disaggregate", "edf-best-fit", "fcfs", "fixed:4", "srtf")
IMAGES = SimulatedModel(key="images", profile="flux.1-dev-8xh100", slo_scale=1.5)
MIX = "images:20,videos:1"
NEAR_BOUND = 0.03
POOLS = {"wan2.2-ti2v-5b": (20.0, 40.0, 60.0), "wan2.1-14b": (6.0, 12.0, 20.0)}
"""Requests per minute, by the model of videos."""


@dataclass(frozen=True)
class Cell:
    """One pool at one load."""

    pool: str
    scenario: Scenario
    comparison: Comparison

    @property
    def title(self) -> str:
        return f"{self.pool}, {self.scenario.rate_per_min:g}/min"

    @property
    def bound(self) -> float:
        assert self.comparison.bound is not None
        return self.comparison.bound

    def sar(self, policy: str) -> float:
        return next(result.sar for result in self.comparison.results if result.policy == policy)


def scenario_at(pool: str, rate_per_min: float, num_requests: int) -> Scenario:
    videos = SimulatedModel(key="videos", profile=f"{pool}-8xh100", slo_multiple=1.5)
    return Scenario(models=(IMAGES, videos), mix=MIX, rate_per_min=rate_per_min, num_requests=num_requests)


def table_of(cells: Sequence[Cell]) -> Table:
    """A row per policy; three columns per cell, in percent: all, images, videos."""
    table = Table(title="SAR in percent: all, images, videos", title_justify="left")
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
        kept[f"{cell.title}: lookahead first ({100 * ours:.1f} of {100 * best:.1f})"] = ours >= best
        if cell.scenario.rate_per_min != max(POOLS[cell.pool]):
            short = cell.bound - ours
            kept[f"{cell.title}: lookahead within 3 points of the bound ({100 * short:.1f} below)"] = (
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
    named = [(pool, scenario_at(pool, rate, options.requests)) for pool in pools for rate in POOLS[pool]]
    console = Console(highlight=False, width=120)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating")

        def on_progress(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        seeds = range(options.first_seed, options.first_seed + options.seeds)
        with Study(seeds, num_processes=options.processes, on_progress=on_progress) as study:
            comparisons = study.compare([scenario for _, scenario in named], policies)
    cells = [Cell(pool, scenario, comparison) for (pool, scenario), comparison in zip(named, comparisons, strict=True)]
    for pool in pools:
        console.print(table_of([cell for cell in cells if cell.pool == pool]))
    for text, is_kept in check(cells).items():
        console.print(f"{'yes' if is_kept else 'NO ':4} {text}", markup=False)


if __name__ == "__main__":
    main()
