"""Approximate caching: a request that resembles a served one starts from its latent, a number of steps in.

TetriServe, 6.2, after Nirvana (S. Agarwal et al., "Approximate Caching for Efficiently Serving Diffusion Models", NSDI
2024, arXiv 2312.04429). Only what it does to the work is modelled: how many steps are skipped, not which prompts are
alike nor what the picture loses. Looking a prompt up takes no time here: the key is an embedding that encoding computes
anyway, and comparing it with 10,000 vectors of 768 numbers is 8 million multiplications, nothing beside one step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from tetriserve.core.errors import ConfigError
from tetriserve.core.request import Request, Stage
from tetriserve.workload.randomness import RandomSource, draw

SKIPPED_STEPS = (5, 10, 15, 20, 25)
"""What a hit skips, of `OF_STEPS` steps (TetriServe, 6.2)."""
OF_STEPS = 50
HIT_RATE = 0.7
"""Of `nirvana`, each number of skipped steps as likely as the others. Neither paper gives these shares: they are an
assumption, chosen so that 0.7 * 15 / 50 = 21 % of the steps are saved, which is the GPU time that Nirvana reports."""

NO_CACHE = "none"
USAGE = f"{NO_CACHE}, nirvana[:HIT_RATE], or skipped steps of 50 and their shares, such as 10:0.3,25:0.2"
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Cache:
    """Skipped steps, out of `OF_STEPS`, and the share of requests that skips as many. The rest are misses."""

    skipped: tuple[int, ...]
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        for skipped, share in zip(self.skipped, self.shares, strict=True):
            if not 0 < skipped < OF_STEPS:
                raise ConfigError(f"a hit skips {skipped} steps; allowed: 1 to {OF_STEPS - 1}")
            if not 0 <= share <= 1:
                raise ConfigError(f"the share of hits that skip {skipped} steps is {share:g}; allowed: 0 to 1")
        if self.hit_rate > 1 + _ROUNDING:
            raise ConfigError(f"the shares of hits add up to {self.hit_rate:g}; allowed: 1 at most")

    @property
    def hit_rate(self) -> float:
        return sum(self.shares)

    def shorten(self, requests: Iterable[Request], random: RandomSource) -> Iterator[Request]:
        """The same requests with the steps that are left after the cache; deadlines stay.

        A request of another number of steps skips the same part of them, rounded, and runs one at least. One number is
        drawn per request, so what is skipped does not depend on anything else about the requests.
        """
        choices, weights = (*self.skipped, 0), (*self.shares, max(0.0, 1 - self.hit_rate))
        for request in requests:
            part = draw(random, choices, weights) / OF_STEPS
            yield replace(request, stages=tuple(_shortened(stage, part) for stage in request.stages))


def _shortened(stage: Stage, part: float) -> Stage:
    """`stage` without `part` of its steps; as it is where it has none."""
    if not stage.num_steps:
        return stage
    return replace(stage, num_steps=max(1, stage.num_steps - math.floor(part * stage.num_steps + 0.5)))


def parse_cache(spec: str) -> Cache | None:
    """The cache that `spec` names: `none`, `nirvana`, `nirvana:0.9`, `10:0.3,25:0.2`.

    Raises:
        ConfigError: an unknown cache or a number that cannot be used.
    """
    name, _, argument = spec.partition(":")
    if spec == NO_CACHE:
        return None
    if name == "nirvana":
        hit_rate = _number(spec, argument) if argument else HIT_RATE
        if not 0 <= hit_rate <= 1:
            raise ConfigError(f"cache {spec!r}: the hit rate is {hit_rate:g}; allowed: 0 to 1")
        return Cache(SKIPPED_STEPS, (hit_rate / len(SKIPPED_STEPS),) * len(SKIPPED_STEPS))
    if not spec[:1].isdecimal():
        raise ConfigError(f"unknown cache {spec!r}; choose one of: {USAGE}")
    shares: dict[int, float] = {}
    for item in spec.split(","):
        skipped, _, share = (part.strip() for part in item.partition(":"))
        if not (skipped.isdecimal() and len(skipped) <= 2 and share):
            raise ConfigError(f"cache {spec!r}: cannot use {item!r}; write {USAGE}")
        if int(skipped) in shares:
            raise ConfigError(f"cache {spec!r} names {skipped} steps twice; give each one share")
        shares[int(skipped)] = _number(spec, share)
    try:
        return Cache(tuple(shares), tuple(shares.values()))
    except ConfigError as error:
        raise ConfigError(f"cache {spec!r}: {error}") from None


def _number(spec: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"cache {spec!r}: {text!r} is not a number") from None
