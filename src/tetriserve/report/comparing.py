"""`tetriserve simulate`: from a scenario to a printed table and files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from tetriserve.core.bounds import check_seeds
from tetriserve.report.command import command_of
from tetriserve.report.page import reserve_page, write_page
from tetriserve.report.printing import print_table
from tetriserve.report.recording import Recorder
from tetriserve.report.single import render_comparison
from tetriserve.report.tables import comparison_json, comparison_table
from tetriserve.simulator.comparison import Comparison, compare
from tetriserve.simulator.models import SimulatedModel
from tetriserve.simulator.scenario import Scenario, Setting, prepare
from tetriserve.workload.cache import NO_CACHE
from tetriserve.workload.outcome import Outcome


def compare_and_print(
    scenario: Scenario,
    *,
    policies: str,
    num_seeds: int,
    first_seed: int,
    has_bound: bool,
    out: Path | None,
    trace_out: Path | None,
    report: Path | None,
    is_json: bool,
    progress: Console,
) -> None:
    """Simulate, write `out` and `trace_out` while at it, print the comparison on stdout, and draw it into `report`.

    A workload that is the same for every seed is run once.

    Raises:
        ConfigError: the scenario, a policy or a file cannot be used; said before anything runs.
    """
    check_seeds(first_seed, num_seeds)
    setting = prepare(scenario)
    names = setting.policies(policies)
    seeds = range(first_seed, first_seed + (num_seeds if setting.varies_by_seed else 1))
    if report is not None:
        reserve_page(report)
    first_runs: dict[str, list[Outcome]] = {}

    def take(policy: str, seed: int, outcome: Outcome) -> None:
        recorder.take(policy, seed, outcome)
        if report is not None and seed == first_seed:
            first_runs.setdefault(policy, []).append(outcome)

    with (
        Recorder(out, trace_out, num_ranks=setting.num_ranks) as recorder,
        progress.status("starting", spinner="line") as status,
    ):
        comparison = compare(
            setting,
            names,
            seeds,
            has_bound=has_bound,
            on_run=lambda text: status.update(text),
            on_outcome=take if out or trace_out or report else None,
        )
        if report is not None:
            status.update("drawing")
            _write_report(report, comparison, first_runs, scenario, setting, seeds)
    if is_json:
        print(json.dumps(comparison_json(comparison), indent=1, allow_nan=False))
        return
    print_table(comparison_table(comparison, _title(scenario, setting, len(seeds))))


def _title(scenario: Scenario, setting: Setting, num_seeds: int) -> str:
    return f"{scenario.profile_name} on {setting.num_ranks} ranks: {describe_workload(scenario, f'{num_seeds} seeds')}"


def _write_report(
    path: Path,
    comparison: Comparison,
    first_runs: Mapping[str, Sequence[Outcome]],
    scenario: Scenario,
    setting: Setting,
    seeds: Sequence[int],
) -> None:
    page = render_comparison(
        comparison,
        first_runs,
        num_ranks=setting.num_ranks,
        title=_title(scenario, setting, len(seeds)),
        command=command_of(scenario, list(first_runs), seeds),
    )
    write_page(page, path)


def describe_workload(scenario: Scenario, seeds: str) -> str:
    """What is asked of the pool, as part of a title. seeds: how many, in words."""
    slo = ", ".join(map(_slo, scenario.simulated))
    extra = "" if scenario.cache == NO_CACHE else f", cache {scenario.cache}"
    if scenario.ranks_per_node is not None:
        extra += f", nodes of {scenario.ranks_per_node}"
    if scenario.encoder_ranks is not None:
        extra += f", encode on the first {scenario.encoder_ranks}"
    if scenario.trace is not None:
        return f"{scenario.trace}, SLO where unnamed {slo}{extra}"
    return (
        f"{scenario.num_requests} requests x {seeds}, {scenario.mix}, "
        f"{scenario.rate_per_min:g}/min {scenario.arrivals}, SLO {slo}{extra}"
    )


def _slo(model: SimulatedModel) -> str:
    rule = f"scale {model.slo_scale:g}" if model.slo_multiple is None else f"{model.slo_multiple:g} x degree 1"
    return f"{model.key} {rule}".strip()
