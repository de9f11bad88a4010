"""What it costs that no task spans nodes: the SAR of 32 ranks as nodes of 8, less that of 32 ranks on one node.

Load is the rank time of all requests at their cheapest degrees over that of the pool. Bar: at a load of 0.8 the SAR of
`lookahead` and of `tetriserve` is at most 2 points lower. Workload: flux.1-dev-8xh100, 28 steps, Poisson arrivals. Run

    python benchmarks/nodes.py [--nodes 4x8] [--loads 0.8] [--mixes uniform skewed] [--seeds 5] [--requests 1000]
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

from tetriserve.core.cost import stages_gpu_s
from tetriserve.simulator.run import simulate
from tetriserve.simulator.scenario import Scenario, Setting, parse_nodes, prepare

BAR = 0.02


def mean_gpu_s(setting: Setting) -> float:
    """Rank-seconds of a request at its cheapest degrees."""
    return statistics.fmean(stages_gpu_s(setting.cost, each, each.stages) for each in setting.requests(0))


def sar(setting: Setting, policy: str, seed: int) -> float:
    outcomes = simulate(
        setting.policy(policy), setting.cost, setting.requests(seed), num_ranks=setting.num_ranks, nodes=setting.nodes
    )
    return sum(outcome.is_attained for outcome in outcomes) / setting.num_requests


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", default="4x8")
    parser.add_argument("--policies", nargs="+", default=["lookahead", "tetriserve"])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.8])
    parser.add_argument("--mixes", nargs="+", default=["uniform", "skewed"])
    parser.add_argument("--slo-scale", type=float, default=1.2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1000)
    arguments = parser.parse_args()
    num_nodes, ranks_per_node = parse_nodes(arguments.nodes)
    is_met = True
    print("mix      load  policy             one node   nodes  difference  by seed")
    for mix in arguments.mixes:
        for load in arguments.loads:
            base = Scenario(
                mix=mix,
                slo_scale=arguments.slo_scale,
                num_requests=arguments.requests,
                num_ranks=num_nodes * ranks_per_node,
            )
            base = replace(base, rate_per_min=60 * load * num_nodes * ranks_per_node / mean_gpu_s(prepare(base)))
            whole, divided = prepare(base), prepare(replace(base, ranks_per_node=ranks_per_node))
            for policy in arguments.policies:
                pairs = [(sar(whole, policy, seed), sar(divided, policy, seed)) for seed in range(arguments.seeds)]
                before, after = (statistics.fmean(values) for values in zip(*pairs, strict=True))
                is_met &= load > 0.8 or before - after <= BAR
                each = " ".join(f"{100 * (two - one):+.1f}" for one, two in pairs)
                sars = f"{before:8.4f} {after:7.4f} {100 * (after - before):+10.2f}"
                print(f"{mix:8} {load:4.2f}  {policy:18} {sars}  {each}", flush=True)
    print("held" if is_met else "NOT held")


if __name__ == "__main__":
    main()
