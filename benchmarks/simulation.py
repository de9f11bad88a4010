"""How fast the simulator is: seconds per policy for 300 requests, and a long run with its memory.

Bars: 300 requests x 1 policy within 0.5 s; 100,000 requests with `tetriserve` within 60 s and in flat memory, which is
the peak after a tenth of them against the peak at the end. Workload: flux.1-dev-8xh100, uniform, 24 per minute, SLO
scale 1.2. Run with

    python benchmarks/simulation.py [--requests 100000] [--long-policy tetriserve]
"""

from __future__ import annotations

import argparse
import resource
import time

from tetriserve.simulator.run import simulate
from tetriserve.simulator.scenario import Scenario, Setting, prepare

SHORT = 300
BAR_SHORT_S = 0.5
BAR_LONG_S = 60.0


def setting_of(num_requests: int) -> Setting:
    return prepare(Scenario(mix="uniform", rate_per_min=24, slo_scale=1.2, num_requests=num_requests))


def short_run_s(policy: str) -> tuple[float, float]:
    """Seconds for 300 requests, the best of three, and the share attained."""
    setting = setting_of(SHORT)
    seconds, attained = [], 0
    for _ in range(3):
        start = time.perf_counter()
        runs = simulate(setting.policy(policy), setting.cost, setting.requests(0), num_ranks=setting.num_ranks)
        attained = sum(outcome.is_attained for outcome in runs)
        seconds.append(time.perf_counter() - start)
    return min(seconds), attained / SHORT


def long_run(policy: str, num_requests: int) -> tuple[float, float, float]:
    """Seconds, and peak memory in MiB after a tenth of the outcomes and at the end."""
    setting = setting_of(num_requests)
    early_mib = 0.0
    start = time.perf_counter()
    runs = simulate(setting.policy(policy), setting.cost, setting.requests(0), num_ranks=setting.num_ranks)
    for number, _ in enumerate(runs):
        if number == num_requests // 10:
            early_mib = peak_mib()
    return time.perf_counter() - start, early_mib, peak_mib()


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--long-policy", default="tetriserve")
    arguments = parser.parse_args()

    print(f"{SHORT} requests, best of 3 (bar {BAR_SHORT_S} s)")
    for policy in setting_of(SHORT).policies("all"):
        seconds, sar = short_run_s(policy)
        print(f"  {policy:24} {seconds:6.3f} s   SAR {sar:.3f}")
    seconds, early_mib, late_mib = long_run(arguments.long_policy, arguments.requests)
    print(
        f"{arguments.requests} requests, {arguments.long_policy}: {seconds:.1f} s (bar {BAR_LONG_S:.0f} s for 100,000)"
    )
    print(f"  peak memory after a tenth {early_mib:.1f} MiB, at the end {late_mib:.1f} MiB")


if __name__ == "__main__":
    main()
