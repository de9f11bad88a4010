"""`tetriserve simulate`: from a scenario to a printed table and files."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from tetriserve.core.errors import ConfigError
from tetriserve.report.recording import Recorder
from tetriserve.report.tables import comparison_json, comparison_table
from tetriserve.simulator.comparison import compare
from tetriserve.simulator.scenario import Scenario, Setting, prepare

_WIDTH_OF_FILES = 160


def compare_and_print(
    scenario: Scenario,
    *,
    policies: str,
    num_seeds: int,
    first_seed: int,
    has_bound: bool,
    out: Path | None,
    trace_out: Path | None,
    is_json: bool,
    progress: Console,
) -> None:
    """Simulate, write `out` and `trace_out` while at it, and print the comparison on stdout.

    A workload that is the same for every seed is run once.

    Raises:
        ConfigError: the scenario, a policy or a file cannot be used; said before anything runs.
    """
    if num_seeds < 1:
        raise ConfigError(f"seeds is {num_seeds}; it must be at least 1")
    setting = prepare(scenario)
    names = setting.policies(policies)
    seeds = range(first_seed, first_seed + (num_seeds if setting.varies_by_seed else 1))
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
            on_outcome=recorder.take if out or trace_out else None,
        )
    if is_json:
        print(json.dumps(comparison_json(comparison), indent=1, allow_nan=False))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH_OF_FILES)
    console.print(comparison_table(comparison, _title(scenario, setting, len(seeds))))


def _title(scenario: Scenario, setting: Setting, num_seeds: int) -> str:
    slo = f"scale {scenario.slo_scale:g}" if scenario.slo_multiple is None else f"{scenario.slo_multiple:g} x degree 1"
    if scenario.trace is not None:
        workload = f"{scenario.trace}, SLO where unnamed {slo}"
    else:
        workload = (
            f"{scenario.num_requests} requests x {num_seeds} seeds, {scenario.mix}, "
            f"{scenario.rate_per_min:g}/min {scenario.arrivals}, SLO {slo}"
        )
    return f"{Path(scenario.profile).stem if scenario.profile.endswith('.json') else scenario.profile} on " + (
        f"{setting.num_ranks} ranks: {workload}"
    )
