"""A scenario written as the command that simulates it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields, replace

from tetriserve.simulator.models import SimulatedModel
from tetriserve.simulator.scenario import Scenario

_OPTIONS = {
    "rate_per_min": "rate",
    "num_requests": "requests",
    "num_steps": "steps",
    "num_passes": "passes",
    "num_ranks": "ranks",
}
_OF_MODELS = ("num_steps", "num_passes", "slo_scale", "slo_multiple")


def command_of(scenario: Scenario, policies: Sequence[str], seeds: Sequence[int]) -> str:
    """`tetriserve simulate` with the options that differ from the scenario's defaults, for a shell."""
    words = ["tetriserve", "simulate"]
    for model in scenario.models:
        words += ["--profile", f"{model.key}={model.profile}"]
    for name in _OF_MODELS:
        values = {model.key: getattr(model, name) for model in scenario.models}
        usual = next(field.default for field in fields(SimulatedModel) if field.name == name)
        named = ",".join(f"{key}={_written(value)}" for key, value in values.items() if value != usual)
        words += [f"--{_option(name)}", named] if named else []
    if scenario.ranks_per_node is not None and scenario.num_ranks is not None:
        words += ["--nodes", f"{scenario.num_ranks // scenario.ranks_per_node}x{scenario.ranks_per_node}"]
        scenario = replace(scenario, num_ranks=None, ranks_per_node=None)
    for field in fields(Scenario):
        value = getattr(scenario, field.name)
        if field.name != "models" and value != field.default:
            words += [f"--{_option(field.name)}", _written(value)]
    words += ["--policies", ",".join(policies), "--seeds", str(len(seeds))]
    if seeds[0]:
        words += ["--seed", str(seeds[0])]
    return shlex.join(words)


def _option(field: str) -> str:
    return _OPTIONS.get(field, field).replace("_", "-")


def _written(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
