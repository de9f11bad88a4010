"""A scenario written as the command that simulates it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields

from tetriserve.simulator.scenario import Scenario

_OPTIONS = {"rate_per_min": "rate", "num_requests": "requests", "num_steps": "steps", "num_ranks": "ranks"}


def command_of(scenario: Scenario, policies: Sequence[str], seeds: Sequence[int]) -> str:
    """`tetriserve simulate` with the options that differ from the scenario's defaults, for a shell."""
    words = ["tetriserve", "simulate"]
    for field in fields(Scenario):
        value = getattr(scenario, field.name)
        if value != field.default:
            option = _OPTIONS.get(field.name, field.name).replace("_", "-")
            words += [f"--{option}", f"{value:g}" if isinstance(value, float) else str(value)]
    words += ["--policies", ",".join(policies), "--seeds", str(len(seeds))]
    if seeds[0]:
        words += ["--seed", str(seeds[0])]
    return shlex.join(words)
