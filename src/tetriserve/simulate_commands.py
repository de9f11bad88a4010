"""`tetriserve simulate` and `tetriserve plan`: what no server is needed for."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tetriserve import options
from tetriserve.core.errors import ConfigError
from tetriserve.core.plan import LATE_SHARE
from tetriserve.options import ENV, FORMATS, one_line_errors, option

console = Console(stderr=True, highlight=False)


def simulate(
    config: options.Config = None,
    profile: options.SimulatedProfiles = None,
    policies: Annotated[str, option("policies", "Names with commas, such as tetriserve,fixed:2, or all.")] = "all",
    mix: options.Mix = "uniform",
    rate: options.Rate = 12.0,
    arrivals: options.Arrivals = "poisson",
    slo_scale: options.SloScales = "1",
    slo_multiple: options.SloMultiples = None,
    requests: options.Requests = 300,
    steps: options.Steps = None,
    passes: options.Passes = None,
    cache: options.Cache = "none",
    ranks: Annotated[int | None, option("ranks", "Default: the profile's largest degree.")] = None,
    nodes: Annotated[
        str | None, option("nodes", "Nodes and ranks on each, such as 4x8, instead of --ranks: no task spans nodes.")
    ] = None,
    encoder_ranks: options.EncoderRanks = None,
    seeds: Annotated[int, option("seeds", "How many workloads to average over.")] = 5,
    seed: options.FirstSeed = 0,
    noise: options.Noise = 0.0,
    late_share: options.LateShare = LATE_SHARE,
    bound: Annotated[
        bool, typer.Option("--bound/--no-bound", envvar=ENV + "BOUND", help="Compute what no scheduler can exceed.")
    ] = True,
    trace: options.Trace = None,
    out: Annotated[Path | None, option("out", "Write every request's outcome here, as JSON Lines.")] = None,
    trace_out: Annotated[
        Path | None, option("trace-out", "Write a Perfetto trace of the first policy's first run here.")
    ] = None,
    report: Annotated[
        Path | None, option("report", "Write the comparison as an HTML page with figures here, such as run.html.")
    ] = None,
    paper: Annotated[
        Path | None, option("paper", "Draw the TetriServe paper's whole evaluation into this folder, instead.")
    ] = None,
    format: options.Format = FORMATS[0],
) -> None:
    """Compare policies on made-up or recorded requests, without a model: times come from a profile."""
    with one_line_errors():
        from tetriserve.report.comparing import compare_and_print
        from tetriserve.report.publishing import publish_paper
        from tetriserve.simulator.scenario import Scenario, parse_nodes
        from tetriserve.simulator.writing import with_profiles

        is_json = options.is_json(format)
        ranks_per_node = None
        if nodes is not None:
            if ranks is not None:
                raise ConfigError(f"ranks is {ranks} beside nodes, which says how many there are; leave one out")
            num_nodes, ranks_per_node = parse_nodes(nodes)
            ranks = num_nodes * ranks_per_node
        scenario = with_profiles(
            Scenario(
                mix=mix,
                arrivals=arrivals,
                rate_per_min=rate,
                num_requests=requests,
                num_ranks=ranks,
                ranks_per_node=ranks_per_node,
                encoder_ranks=encoder_ranks,
                noise=noise,
                late_share=late_share,
                trace=trace,
                cache=cache,
            ),
            profile or [options.PROFILE],
            steps=steps,
            passes=passes,
            slo_scale=slo_scale,
            slo_multiple=slo_multiple,
        )
        if paper is not None:
            for name, value in (("out", out), ("trace-out", trace_out), ("report", report)):
                if value is not None:
                    raise ConfigError(f"{name} is {value} beside paper, which writes files of its own; leave one out")
            if encoder_ranks is not None:
                raise ConfigError(
                    f"encoder-ranks is {encoder_ranks} beside paper, where every rank encodes; leave one out"
                )
            publish_paper(
                scenario,
                paper,
                policies=policies,
                num_seeds=seeds,
                first_seed=seed,
                has_bound=bound,
                num_processes=len(os.sched_getaffinity(0)),
                clock=time.perf_counter,
                progress=console,
            )
            return
        compare_and_print(
            scenario,
            policies=policies,
            num_seeds=seeds,
            first_seed=seed,
            has_bound=bound,
            out=out,
            trace_out=trace_out,
            report=report,
            is_json=is_json,
            progress=console,
        )


def plan(
    config: options.Config = None,
    profile: options.SimulatedProfiles = None,
    target: Annotated[float, option("target", "SAR to hold: the share of requests that finish in time.")] = 0.99,
    policies: Annotated[
        str, option("policies", "Policies to try; tetriserve with several lengths of a round.")
    ] = options.SHORTLIST,
    mix: options.Mix = "uniform",
    rate: options.Rate = 12.0,
    arrivals: options.Arrivals = "poisson",
    slo_scale: options.SloScales = "1",
    slo_multiple: options.SloMultiples = None,
    requests: options.Requests = 300,
    steps: options.Steps = None,
    passes: options.Passes = None,
    cache: options.Cache = "none",
    encoder_ranks: options.EncoderRanks = None,
    ranks_per_node: Annotated[
        int | None, option("ranks-per-node", "The pool grows by nodes of so many GPUs, and no task spans nodes.")
    ] = None,
    max_ranks: Annotated[int, option("max-ranks", "The largest pool to consider.")] = 64,
    seeds: Annotated[int, option("seeds", "Workloads on which the target must be held.")] = 10,
    seed: options.FirstSeed = 0,
    noise: options.Noise = 0.0,
    late_share: options.LateShare = LATE_SHARE,
    trace: options.Trace = None,
    format: options.Format = FORMATS[0],
) -> None:
    """Find the smallest number of GPUs that holds a target, by simulation. Exit code 1: none does."""
    with one_line_errors():
        from tetriserve.report.sizing import plan_and_print
        from tetriserve.simulator.scenario import Scenario
        from tetriserve.simulator.writing import with_profiles

        scenario = with_profiles(
            Scenario(
                mix=mix,
                arrivals=arrivals,
                rate_per_min=rate,
                num_requests=requests,
                ranks_per_node=ranks_per_node,
                encoder_ranks=encoder_ranks,
                noise=noise,
                late_share=late_share,
                trace=trace,
                cache=cache,
            ),
            profile or [options.PROFILE],
            steps=steps,
            passes=passes,
            slo_scale=slo_scale,
            slo_multiple=slo_multiple,
        )
        is_met = plan_and_print(
            scenario,
            target=target,
            policies=policies,
            num_seeds=seeds,
            first_seed=seed,
            max_ranks=max_ranks,
            is_json=options.is_json(format),
            progress=console,
        )
    if not is_met:
        raise typer.Exit(1)
