"""Scenarios as the command line writes them: values for one model, or for each of several by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tetriserve.core.errors import ConfigError
from tetriserve.simulator.models import SimulatedModel
from tetriserve.simulator.scenario import Scenario

Number = TypeVar("Number", int, float)
_KEY = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)


def with_profiles(
    scenario: Scenario,
    profiles: Sequence[str],
    *,
    steps: str | None,
    passes: str | None,
    slo_scale: str,
    slo_multiple: str | None,
) -> Scenario:
    """`scenario` with one plain profile, or with several models named NAME=PROFILE.

    `steps`, `passes`, `slo_scale` and `slo_multiple` are one number for all models, or NAME=NUMBER with commas, where
    models that are not named have their default.

    Raises:
        ConfigError: a name is unknown, missing or given twice, or a number is none.
    """
    named = _named(profiles)
    keys = tuple(named)
    num_steps, num_passes = _values("steps", steps, int, keys), _values("passes", passes, int, keys)
    scales, multiples = _values("slo-scale", slo_scale, float, keys), _values("slo-multiple", slo_multiple, float, keys)
    models = tuple(
        SimulatedModel(
            key=key,
            profile=profile,
            num_steps=num_steps.get(key),
            num_passes=num_passes.get(key),
            slo_scale=scales.get(key, 1.0),
            slo_multiple=multiples.get(key),
        )
        for key, profile in named.items()
    )
    if keys != ("",):
        return replace(scenario, models=models)
    (model,) = models
    return replace(
        scenario,
        profile=model.profile,
        num_steps=model.num_steps,
        num_passes=model.num_passes,
        slo_scale=model.slo_scale,
        slo_multiple=model.slo_multiple,
    )


def _named(profiles: Sequence[str]) -> dict[str, str]:
    """Profiles by the names of their models; a plain one, which must be alone, by the empty name."""
    if len(profiles) == 1 and ("=" not in profiles[0] or Path(profiles[0]).exists()):
        return {"": profiles[0]}
    named: dict[str, str] = {}
    for written in profiles:
        key, has_name, profile = written.partition("=")
        if not has_name:
            raise ConfigError(f"profile is {written!r} beside others; write NAME={written}, with a name for each model")
        if not _KEY.fullmatch(key):
            raise ConfigError(f"profile {written!r}: a model's name is letters, digits, '_', '.' and '-'")
        if key in named:
            raise ConfigError(f"profile {written!r}: there are two models named {key}; give each a name of its own")
        named[key] = profile
    return named


def _values(name: str, text: str | None, kind: Callable[[str], Number], keys: Sequence[str]) -> Mapping[str, Number]:
    """By model, what `text` says; models that it says nothing of are left out."""
    if text is None:
        return {}
    if "=" not in text:
        return dict.fromkeys(keys, _number(name, text, kind))
    values: dict[str, Number] = {}
    for item in text.split(","):
        key, _, number = (part.strip() for part in item.partition("="))
        if key not in keys or not key:
            models = ", ".join(filter(None, keys)) or "one, which has no name: write the number alone"
            raise ConfigError(f"{name} {text!r}: unknown model {key!r}; models: {models}")
        if key in values:
            raise ConfigError(f"{name} {text!r} names {key} twice")
        values[key] = _number(name, number, kind)
    return values


def _number(name: str, text: str, kind: Callable[[str], Number]) -> Number:
    try:
        return kind(text)
    except ValueError:
        noun = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{name} is {text[:40]!r}; it must be {noun}, or NAME=NUMBER with commas") from None
