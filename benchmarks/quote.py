"""How long a quote takes, and how much its promises are worth.

Time: pools with 100 unfinished requests that came at once, deadlines tight (most cannot be met) or wide (all can); each
policy is asked for quotes of random sizes and deadlines. Timed are the forecast without the newcomer, which quotes of
one moment share, and the quote. Seconds are CPU seconds of this process.

Calibration: the simulator with tasks that take more or less than planned (`--noise`, as a fraction). Every arrival asks
for a quote. With `admit: promised` only those whose deadline can be promised are admitted, as under `deadline_policy:
reject`; with `admit: all` everybody is, and later arrivals may take what was quoted to earlier ones. Printed is, of
the requests quoted feasible, how many attained; and of those quoted infeasible and admitted all the same, how many did.

    python benchmarks/quote.py [--queue 100] [--policies tetriserve lookahead ...] [--skip time|calibration]
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from tetriserve.control import Controller
from tetriserve.control.foresight import Foresight
from tetriserve.control.spare import Spare
from tetriserve.core.cost import stages_gpu_s
from tetriserve.core.events import Submitted, WorkerJoined
from tetriserve.core.forecast import Quote
from tetriserve.core.request import Request
from tetriserve.core.stages import image_stages
from tetriserve.policies import Policy, make_policy
from tetriserve.profile.bundled import open_profile
from tetriserve.profile.cost import ProfileCost
from tetriserve.simulator import Simulation
from tetriserve.workload.arrivals import parse_arrivals
from tetriserve.workload.mixes import parse_mix
from tetriserve.workload.slo import MultipleRule
from tetriserve.workload.synthesis import Portion, Synthesis

POLICIES = ("tetriserve", "lookahead", "fixed:1", "fixed:2", "fcfs", "rssp", "sjf", "srtf", "edf", "edf-best-fit")
POOLS = (("flux.1-dev-8xh100", 16, 28, 1.0), ("tetriserve-tiny.2-epyc-cores.2-ranks", 2, 20, 3.0))
"""Profile, ranks, steps, and deadlines of the calibration as a multiple of the time alone on one rank."""
SLO_S = {"tight": (1.0, 6.0), "wide": (5.0, 300.0)}
"""Deadlines after arrival, uniform."""
BAR_MS = 20.0


@dataclass(frozen=True)
class Pool:
    """A profile, a number of ranks, and policies for them."""

    profile: str
    num_ranks: int
    num_steps: int
    slo_multiple: float

    @property
    def cost(self) -> ProfileCost:
        return ProfileCost(open_profile(self.profile))

    def policy_maker(self, spec: str) -> Callable[[], Policy]:
        cost = self.cost
        return lambda: make_policy(spec, cost, num_ranks=self.num_ranks, shapes=cost.profile.shapes)

    def request(self, name: str, dice: random.Random, slo_s: tuple[float, float]) -> Request:
        shape = dice.choice(self.cost.profile.shapes)
        return Request(
            request_id=name, prompt="", shape=shape, stages=image_stages(self.num_steps), seed=0,
            arrival_s=0.0, deadline_s=dice.uniform(*slo_s),
        )  # fmt: skip


def time_quotes(pool: Pool, spec: str, slo: str, num_queued: int, num_quotes: int) -> str:
    dice = random.Random(1)
    new_policy = pool.policy_maker(spec)
    controller = Controller(new_policy(), pool.cost)
    for number in range(num_queued):
        controller.handle(Submitted(pool.request(f"r{number}", dice, SLO_S[slo])), 0.0)
    for rank in range(pool.num_ranks):
        controller.handle(WorkerJoined(rank), 0.0)
    foresight = Foresight(new_policy)
    forecasts_ms, quotes_ms, num_feasible = [], [], 0
    for number in range(num_quotes):
        newcomer = pool.request(f"n{number}", dice, SLO_S[slo])
        start_s = time.process_time()
        without = foresight.forecast(controller, 0.0)
        between_s = time.process_time()
        quote = foresight.quote(controller, 0.0, [newcomer], without)
        end_s = time.process_time()
        forecasts_ms.append(1e3 * (between_s - start_s))
        quotes_ms.append(1e3 * (end_s - between_s))
        num_feasible += quote.is_feasible
    without_ms, quote_ms = ((quantile(values, 0.5), quantile(values, 0.99)) for values in (forecasts_ms, quotes_ms))
    return (
        f"{spec:>13} {pool.num_ranks:5} {slo:>6}   {without_ms[0]:6.1f} {without_ms[1]:6.1f}"
        f"     {quote_ms[0]:6.1f} {quote_ms[1]:6.1f}   {num_feasible / num_quotes:8.0%}"
        f"   p99 <= {BAR_MS:.0f} ms {'held' if quote_ms[1] <= BAR_MS else 'missed'}"
    )


@dataclass(slots=True)
class Kept:
    """Of requests quoted feasible and infeasible: how many attained, and how far off the predicted finish was."""

    num_asked: int = 0
    feasible: list[bool] = field(default_factory=list)
    infeasible: list[bool] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


def calibrate(pool: Pool, spec: str, load: float, *, admits_all: bool, options: argparse.Namespace) -> str:
    """`load` is what arrives over what the ranks can do at the cheapest degrees."""
    kept = Kept()
    for seed in range(options.seeds):
        _calibrate_seed(pool, spec, load, admits_all, seed, options, kept)
    share = _share(kept.feasible)
    promised = len(kept.feasible) / kept.num_asked
    error = f"{statistics.median(map(abs, kept.errors)):.1%}" if kept.errors else "-"
    return (
        f"{spec:>13} {pool.num_ranks:5} {load:5.1f}  {'all' if admits_all else 'promised':>8}   {promised:8.1%}"
        f"   {share:>8}   {_share(kept.infeasible):>10}   {error:>6}"
    )


def _calibrate_seed(
    pool: Pool, spec: str, load: float, admits_all: bool, seed: int, options: argparse.Namespace, kept: Kept
) -> None:
    new_policy = pool.policy_maker(spec)
    foresight = Foresight(new_policy)
    simulation = Simulation(new_policy(), pool.cost, num_ranks=pool.num_ranks, noise=options.noise, seed=seed)
    quotes: dict[str, Quote] = {}
    spare = Spare()

    def admits(request: Request) -> bool:
        controller, now = simulation.controller, simulation.now
        without = foresight.forecast(controller, now)
        spare.note_time(now)
        quote = foresight.quote(controller, now, [request], without, spare=spare.fraction)
        quotes[request.request_id] = quote
        if quote.is_feasible:
            spare.note_promise(request)
        return admits_all or quote.is_feasible

    for outcome in simulation.run(workload(pool, load, options.requests, seed), admits):
        quote = quotes[outcome.request.request_id]
        if quote.is_feasible:
            spare.note_end(outcome.request.request_id, outcome.finish_s)
        (kept.feasible if quote.is_feasible else kept.infeasible).append(outcome.is_attained)
        kept.errors.append((outcome.finish_s - quote.finish_s) / outcome.latency_s)
    kept.num_asked += len(quotes)


def workload(pool: Pool, load: float, num_requests: int, seed: int) -> Iterator[Request]:
    """Poisson arrivals of uniform sizes, deadlines a multiple of what a request takes alone on one rank."""
    cost = pool.cost
    synthesis = Synthesis(
        arrivals=parse_arrivals("poisson", 60 * load * pool.num_ranks / mean_gpu_s(pool)),
        portions=(Portion(mix=parse_mix("uniform", cost.profile.shapes), num_steps=pool.num_steps),),
        deadlines=MultipleRule(pool.slo_multiple, cost),
        num_requests=num_requests,
    )
    return synthesis.requests(random.Random(seed))


def mean_gpu_s(pool: Pool) -> float:
    """Rank-seconds of a request at its cheapest degree, over the sizes."""
    cost, dice = pool.cost, random.Random(0)
    probe = pool.request("probe", dice, (0.0, 0.0))
    total_s = 0.0
    for shape in cost.profile.shapes:
        request = replace(probe, shape=shape)
        total_s += stages_gpu_s(cost, request, request.stages)
    return total_s / len(cost.profile.shapes)


def quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def _share(hits: Sequence[bool]) -> str:
    return f"{sum(hits) / len(hits):.1%}" if hits else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", nargs="+", default=None, help="default: all for time, three for calibration")
    parser.add_argument("--queue", type=int, default=100, help="unfinished requests")
    parser.add_argument("--quotes", type=int, default=30, help="timed per line")
    parser.add_argument("--loads", nargs="+", type=float, default=[0.6, 0.9, 1.2])
    parser.add_argument("--requests", type=int, default=200, help="per seed, for the calibration")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--skip", choices=["time", "calibration"])
    options = parser.parse_args()
    pools = [Pool(*pool) for pool in POOLS]
    if options.skip != "time":
        print(f"{options.queue} unfinished requests; CPU ms, p50 and p99")
        print(f"{'policy':>13} {'ranks':>5} {'slo':>6}   {'forecast without':>15}  {'quote':>12}      feasible")
        for pool, spec, slo in itertools.product(pools, options.policies or POLICIES, SLO_S):
            print(time_quotes(pool, spec, slo, options.queue, options.quotes), flush=True)
    if options.skip != "calibration":
        print(f"\ncalibration: {options.seeds} x {options.requests} requests, noise {options.noise:g}")
        print(f"{'policy':>13} {'ranks':>5} {'load':>5} {'admit':>9}   feasible   attained   infeasible   median error")
        print(f"{'':>36}   {'of all':>8}   {'of them':>8}   {'attained':>10}   of the finish")
        specs = options.policies or ("tetriserve", "lookahead", "fixed:1")
        for pool, spec, load, admits_all in itertools.product(pools, specs, options.loads, (False, True)):
            print(calibrate(pool, spec, load, admits_all=admits_all, options=options), flush=True)


if __name__ == "__main__":
    main()
