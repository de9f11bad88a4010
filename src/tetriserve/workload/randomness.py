"""The seeded generator that workloads draw from; `random.Random` is one. Nothing here makes its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol, TypeVar

_Choice = TypeVar("_Choice")


class RandomSource(Protocol):
    """The part of `random.Random` that workloads use."""

    def random(self) -> float:
        """Uniform in [0, 1)."""
        ...

    def gammavariate(self, alpha: float, beta: float, /) -> float:
        """Gamma distributed with shape `alpha` and scale `beta`: its mean is their product."""
        ...

    def expovariate(self, lambd: float, /) -> float:
        """Exponentially distributed with mean 1 / `lambd`."""
        ...

    def getrandbits(self, k: int, /) -> int:
        """Uniform in [0, 2^k)."""
        ...


def draw(random: RandomSource, choices: Sequence[_Choice], weights: Sequence[float]) -> _Choice:
    """One of `choices`, each as likely as its weight says."""
    bounds = list(accumulate(weights))
    point = random.random() * bounds[-1]
    return next(choice for choice, bound in zip(choices, bounds, strict=True) if point < bound)
