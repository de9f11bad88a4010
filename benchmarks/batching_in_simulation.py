"""What batching is worth in simulation: policies with and without it on qwen-image-h200, beside the upper bound.

A mix of mostly 512x512 and a uniform one, three arrival rates up to overload each: attainment in percent, and the bars
that the project sets itself. A minute or two on two cores. Run with

    python benchmarks/batching_in_simulation.py [--first-seed 100] [--seeds 5]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tetriserve.simulator.comparison import Comparison
from tetriserve.simulator.scenario import Scenario
from tetriserve.simulator.study import Study

MIXES = {
    "256x256:1,512x512:6,1024x1024:2,1536x1536:1": ("512-heavy", (40.0, 70.0, 100.0)),
    "uniform": ("uniform", (20.0, 40.0, 60.0)),
}
SLO_MULTIPLES = (2.0, 3.0)
OURS = ("tetriserve", "lookahead")
WITHOUT = {policy: f"{policy}:batching=off" for policy in OURS}
PEERS = ("fcfs:batch=8", "fixed:1:batch=8", "fixed:2:batch=8", "fixed:4:batch=8")


def print_cells(scenarios: Sequence[Scenario], sars: Sequence[dict[str, float]], console: Console) -> None:
    table = Table(title="SLO attainment in percent on qwen-image-h200; off: without batching")
    best_peer = "best peer"
    for heading in (
        "mix",
        "per min",
        "SLO",
        *(name for policy in OURS for name in (policy, "off")),
        best_peer,
        "bound",
    ):
        table.add_column(heading, justify="right")
    for scenario, sar in zip(scenarios, sars, strict=True):
        table.add_row(
            MIXES[scenario.mix][0], f"{scenario.rate_per_min:g}", f"{scenario.slo_multiple:g}",
            *(f"{sar[name]:.1f}" for policy in OURS for name in (policy, WITHOUT[policy])),
            f"{max(sar[peer] for peer in PEERS):.1f}", f"{sar['bound']:.1f}",
        )  # fmt: skip
    console.print(table)


def sars_of(comparison: Comparison) -> dict[str, float]:
    assert comparison.bound is not None
    return {"bound": 100 * comparison.bound} | {result.policy: 100 * result.sar for result in comparison.results}


def bars(scenarios: Sequence[Scenario], sars: Sequence[dict[str, float]]) -> dict[str, bool]:
    gains = {policy: [sar[policy] - sar[WITHOUT[policy]] for sar in sars] for policy in OURS}
    leads = {policy: [sar[policy] - max(sar[peer] for peer in PEERS) for sar in sars] for policy in OURS}
    most = {mix: max(rates) for mix, (_, rates) in MIXES.items()}
    overloaded = [scenario.rate_per_min == most[scenario.mix] for scenario in scenarios]
    at_most = [gain for gain, is_over in zip(gains["lookahead"], overloaded, strict=True) if is_over]
    found = {
        f"lookahead with batching never below without by more than 0.3: {min(gains['lookahead']):+.1f} at worst": min(
            gains["lookahead"]
        ) >= -0.3,
        f"above it at the highest rates by 5 points or more: by {min(at_most):.1f} to {max(at_most):.1f}": min(
            at_most
        ) >= 5,
    }  # fmt: skip
    for policy in OURS:
        found[f"{policy} above every peer that batches: by {min(leads[policy]):.1f} or more"] = min(leads[policy]) >= 0
    within = all(sar[name] <= sar["bound"] + 1e-9 for sar in sars for name in sar)
    return {**found, "no policy above the bound": within}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=100, help="the policies were developed on seeds below 100")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    scenarios = [
        Scenario(
            profile="qwen-image-h200", mix=mix, rate_per_min=rate, slo_multiple=multiple, num_requests=options.requests
        )
        for mix, (_, rates) in MIXES.items()
        for rate, multiple in product(rates, SLO_MULTIPLES)
    ]
    console = Console(highlight=False, width=110)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating")

        def on_progress(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        with Study(seeds, num_processes=options.processes, on_progress=on_progress) as study:
            comparisons = study.compare(scenarios, [*OURS, *WITHOUT.values(), *PEERS], has_bound=True)
    sars = [sars_of(comparison) for comparison in comparisons]
    print_cells(scenarios, sars, console)
    for text, is_kept in bars(scenarios, sars).items():
        console.print(f"{'yes' if is_kept else 'NO ':4} {text}", markup=False)


if __name__ == "__main__":
    main()
