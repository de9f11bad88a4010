"""Ranges of the numbers that users give. Every such number has one: an absurd number ends in a line, not in a hang."""

from __future__ import annotations

import reprlib

from tetriserve.core.errors import ConfigError

MAX_TIME_S = 7 * 24 * 3600.0
"""Of any time limit."""
MAX_RANKS = 1024
MAX_REQUESTS = 1_000_000
MAX_STEPS = 1000
"""Of one request: as many as diffusion models are trained on."""
MAX_SEEDS = 10_000
MAX_SEED = 2**63 - 1
SLO_SCALES = (1e-3, 1e6)


def check_range(name: str, value: float, least: float, most: float) -> None:
    """
    Raises:
        ConfigError: `value` is NaN, below `least` or above `most`.
    """
    if not least <= value <= most:
        raise ConfigError(f"{name} is {shown(value)}; allowed: {shown(least)} to {shown(most)}")


def check_seeds(first_seed: int, num_seeds: int) -> None:
    """
    Raises:
        ConfigError: no workloads can be made from these.
    """
    check_range("seed", first_seed, -MAX_SEED, MAX_SEED)
    check_range("seeds", num_seeds, 1, MAX_SEEDS)


def shown(value: object) -> str:
    """What a user gave, for a message of one line. Python refuses to write integers of many digits."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    return reprlib.repr(value)
