"""How policies compare in simulation: attainment (SAR) and mean latency over mixes, arrival rates and deadlines.

Sizes 256 to 2048, Poisson arrivals, base deadlines of 1.5, 2, 3 and 5 s times the SLO scale, 28 steps, encode and
decode included. Each figure is the mean over the seeds. Run with

    python benchmarks/policies_in_simulation.py PROFILE.json --policies tetriserve lookahead [--by-size] [--noise 0.1]
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from tetriserve.core.request import Request, Shape
from tetriserve.policies import make_policy
from tetriserve.profile.cost import ProfileCost
from tetriserve.profile.table import load_profile
from tetriserve.simulator import simulate
from tetriserve.workload.outcome import Outcome

DEADLINES_S = {256: 1.5, 512: 2.0, 1024: 3.0, 2048: 5.0}
NUM_STEPS = 28


def weights(mix: str) -> list[float]:
    """Relative frequency per size.

    `uniform`; `skewed`, the paper's exp(L / L_max) with L the tokens; or four numbers such as `4:3:2:1`.
    """
    if mix == "uniform":
        return [1.0] * len(DEADLINES_S)
    if mix == "skewed":
        return [math.exp((size / max(DEADLINES_S)) ** 2) for size in DEADLINES_S]
    return [float(part) for part in mix.split(":")]


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting of the workload."""

    mix: str
    rate_per_min: float
    slo_scale: float

    def requests(self, num_requests: int, seed: int) -> list[Request]:
        """The same arrivals and sizes for every policy and SLO scale."""
        rng = random.Random(seed)
        sizes, relative = list(DEADLINES_S), weights(self.mix)
        arrival_s = 0.0
        requests = []
        for index in range(num_requests):
            arrival_s += rng.expovariate(self.rate_per_min / 60)
            size = rng.choices(sizes, relative)[0]
            requests.append(
                Request(
                    request_id=f"r{index}",
                    prompt="",
                    shape=Shape(size, size),
                    num_steps=NUM_STEPS,
                    seed=index,
                    arrival_s=arrival_s,
                    deadline_s=arrival_s + DEADLINES_S[size] * self.slo_scale,
                )
            )
        return requests


@dataclass(frozen=True, slots=True)
class Score:
    """One run. `by_size`: attainment per size that occurred."""

    attainment: float
    latency_s: float
    by_size: dict[int, float]
    wall_s: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], wall_s: float) -> Score:
        by_size: dict[int, list[bool]] = {}
        for outcome in outcomes:
            by_size.setdefault(outcome.request.shape.height, []).append(outcome.is_attained)
        return cls(
            fmean(outcome.is_attained for outcome in outcomes),
            fmean(outcome.latency_s for outcome in outcomes),
            {size: fmean(by_size[size]) for size in sorted(by_size)},
            wall_s,
        )


def run(spec: str, cell: Cell, options: argparse.Namespace, seed: int) -> Score:
    profile = load_profile(options.profile)
    cost = ProfileCost(profile)
    policy = make_policy(spec, cost, num_ranks=options.ranks, shapes=profile.shapes)
    requests = cell.requests(options.requests, seed)
    start = time.perf_counter()
    outcomes = list(simulate(policy, cost, requests, num_ranks=options.ranks, noise=options.noise, seed=seed))
    return Score.of(outcomes, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", type=Path)
    parser.add_argument("--policies", nargs="+", default=["tetriserve", "lookahead"])
    parser.add_argument("--mixes", nargs="+", default=["uniform", "skewed"], help="uniform, skewed, or like 4:3:2:1")
    parser.add_argument("--rates", nargs="+", type=float, default=[12.0, 24.0, 36.0], help="requests per minute")
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of a task's time, as a fraction")
    parser.add_argument("--by-size", action="store_true", help="attainment per size as well")
    options = parser.parse_args()

    width = max(map(len, options.policies))
    everything: dict[str, list[Score]] = {spec: [] for spec in options.policies}
    print(f"{'mix':>10} {'rate':>4} {'SLO':>4}  {'policy':{width}}   SAR %  latency s")
    cells = [Cell(mix, rate, scale) for mix in options.mixes for rate in options.rates for scale in options.scales]
    for cell in cells:
        for spec in options.policies:
            scores = [run(spec, cell, options, seed) for seed in options.seeds]
            everything[spec] += scores
            print(
                f"{cell.mix:>10} {cell.rate_per_min:4.0f} {cell.slo_scale:4.1f}  {spec:{width}}  {summary(scores)}"
                + (f"  {sizes(scores)}" if options.by_size else "")
            )
    for spec, scores in everything.items():
        seconds = fmean(score.wall_s for score in scores)
        print(f"{'mean':>20}  {spec:{width}}  {summary(scores)}  {sizes(scores)}  ({seconds:.2f} s per run)")


def summary(scores: Sequence[Score]) -> str:
    return f"{100 * fmean(s.attainment for s in scores):6.2f}  {fmean(s.latency_s for s in scores):9.2f}"


def sizes(scores: Sequence[Score]) -> str:
    """Mean attainment per size over the runs in which the size occurred."""
    return "  ".join(
        f"{size}: {100 * fmean(s.by_size[size] for s in scores if size in s.by_size):5.1f}"
        for size in DEADLINES_S
        if any(size in s.by_size for s in scores)
    )


if __name__ == "__main__":
    main()
