"""Does the simulator predict a live run? Attainment and latency of both, side by side.

For each policy, starts the engine on CPU ranks with the bundled model, sends it requests at random times, and then
replays the same requests, at the times at which they really arrived, through the simulator with the profile that the
engine planned with. That profile is measured first, in the same run, unless one is given: how fast this machine is
today is not what is being tested. Bars: attainment within 5 points, mean latency within 10 %. Run with

    python benchmarks/simulated_and_live.py [--policies tetriserve lookahead fixed:1] [--requests 150] [--load 0.7]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tetriserve.config import EngineConfig, ModelConfig, PoolConfig, SchedulingConfig
from tetriserve.core.request import Request
from tetriserve.engine import Generation
from tetriserve.launch import StartProgress, find_model, launch, measure_profile
from tetriserve.policies import make_policy
from tetriserve.profile.cost import ProfileCost
from tetriserve.profile.table import load_profile, save_profile
from tetriserve.simulator import simulate
from tetriserve.workload.arrivals import parse_arrivals
from tetriserve.workload.mixes import parse_mix
from tetriserve.workload.outcome import Outcome
from tetriserve.workload.slo import MultipleRule, slack_s
from tetriserve.workload.synthesis import Portion, Synthesis

BAR_SAR = 0.05
BAR_LATENCY = 0.10
QUIET = StartProgress(step=lambda text: None)


@dataclass(frozen=True, slots=True)
class Score:
    """Of one run: the share attained, and seconds from arrival to finish, mean and median."""

    sar: float
    mean_s: float
    median_s: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Score:
        latencies = [outcome.latency_s for outcome in outcomes]
        attained = statistics.fmean(outcome.is_attained for outcome in outcomes)
        return cls(attained, statistics.fmean(latencies), statistics.median(latencies))


def workload(cost: ProfileCost, options: argparse.Namespace) -> list[Request]:
    """Requests at `--load` times what the ranks can do at degree 1, with deadlines at a multiple of the time alone."""
    mix, deadlines = parse_mix(options.mix, cost.profile.shapes), MultipleRule(options.slo_multiple, cost)

    def at(rate_per_min: float, num_requests: int) -> list[Request]:
        arrivals = parse_arrivals("poisson", rate_per_min)
        synthesis = Synthesis(
            arrivals=arrivals,
            portions=(Portion(mix=mix, num_steps=options.steps),),
            deadlines=deadlines,
            num_requests=num_requests,
        )
        return list(synthesis.requests(random.Random(options.seed)))

    alone_s = statistics.fmean(
        (request.deadline_s - request.arrival_s) / options.slo_multiple for request in at(60.0, 1000)
    )
    return at(60.0 * options.load * options.ranks / alone_s, options.requests)


async def run_live(requests: Sequence[Request], policy: str, profile: Path, num_ranks: int) -> list[Outcome]:
    """The outcomes of `requests`, sent at their arrival times whatever became of those before (open loop)."""
    config = EngineConfig(
        models=(ModelConfig(profile=str(profile)),),
        pool=PoolConfig(num_ranks=num_ranks),
        scheduling=SchedulingConfig(policy=policy, max_queue=len(requests) + 1),
    )
    engine = (await launch(config, QUIET)).engine

    async def send(request: Request, delay_s: float) -> Outcome:
        await asyncio.sleep(delay_s)
        generation = Generation(
            prompt="a red circle above a blue square",
            size=str(request.shape),
            num_steps=request.num_steps,
            slo_s=request.deadline_s - request.arrival_s,
        )
        return (await engine.generate(generation)).outcome

    try:
        warm_up = {request.shape: request for request in requests}
        for request in warm_up.values():  # the first step of a shape also allocates
            await asyncio.gather(*(send(request, 0.0) for _ in range(2 * num_ranks)))
        return list(await asyncio.gather(*(send(request, request.arrival_s) for request in requests)))
    finally:
        await engine.stop()


def run_simulated(outcomes: Sequence[Outcome], policy: str, cost: ProfileCost, num_ranks: int) -> list[Outcome]:
    """The same requests again, from when and with what deadlines they reached the live engine."""
    requests = sorted((outcome.request for outcome in outcomes), key=lambda request: request.arrival_s)
    shapes, deadlines = cost.profile.shapes, MultipleRule(SchedulingConfig().default_slo_scale, cost)
    can_wait_s = slack_s(shapes, cost, deadlines, find_model(None).default_num_steps)  # as the live engine has it
    made = make_policy(policy, cost, num_ranks=num_ranks, shapes=shapes, slack_s=can_wait_s)
    return list(simulate(made, cost, requests, num_ranks=num_ranks))


async def measured(num_ranks: int, path: Path) -> Path:
    """A profile of the bundled model, measured now."""
    save_profile((await measure_profile(None, PoolConfig(num_ranks=num_ranks), (), QUIET))[1], path)
    return path


async def compare(options: argparse.Namespace, path: Path) -> bool:
    """Print both runs of every policy; whether all are within the bars."""
    cost = ProfileCost(load_profile(options.profile or await measured(options.ranks, path)))
    requests = workload(cost, options)
    table = Table(
        title=f"{len(requests)} requests over {requests[-1].arrival_s:.0f} s, {options.mix}, {options.ranks} CPU ranks",
    )
    for heading in ("policy", "SAR live", "simulated", "points off", "mean live", "simulated", "off", "median off"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    is_good = True
    for policy in options.policies:
        outcomes = await run_live(requests, policy, options.profile or path, options.ranks)
        live, simulated = Score.of(outcomes), Score.of(run_simulated(outcomes, policy, cost, options.ranks))
        sar_off, mean_off = simulated.sar - live.sar, simulated.mean_s / live.mean_s - 1
        is_good &= round(abs(sar_off), 6) <= BAR_SAR and abs(mean_off) <= BAR_LATENCY
        table.add_row(
            policy, f"{live.sar:.3f}", f"{simulated.sar:.3f}", f"{100 * sar_off:+.1f}",
            f"{live.mean_s:.2f} s", f"{simulated.mean_s:.2f} s", f"{mean_off:+.1%}",
            f"{simulated.median_s / live.median_s - 1:+.1%}",
        )  # fmt: skip
    Console(highlight=False, width=120).print(table)
    print(f"bars: SAR within {100 * BAR_SAR:.0f} points, mean latency within {BAR_LATENCY:.0%}: {is_good}")
    return is_good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", nargs="+", default=["tetriserve", "lookahead", "fixed:1"])
    parser.add_argument("--mix", default="256x256:1,512x512:1")
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--load", type=float, default=0.7, help="share of what the ranks can do at degree 1")
    parser.add_argument("--slo-multiple", type=float, default=2.0, help="deadline over the time alone at degree 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", type=Path, help="use this profile instead of measuring one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        is_good = asyncio.run(compare(options, Path(directory) / "profile.json"))
    raise SystemExit(0 if is_good else 1)


if __name__ == "__main__":
    main()
