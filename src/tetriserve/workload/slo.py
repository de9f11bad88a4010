"""How long a request may take: a rule gives seconds from arrival to deadline."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

from tetriserve.core.bounds import SLO_SCALES, check_range
from tetriserve.core.cost import fastest_s, narrowest_s
from tetriserve.core.errors import ConfigError
from tetriserve.core.models import of_model
from tetriserve.core.plan import CostModel
from tetriserve.core.probes import probe
from tetriserve.core.request import Request, Shape

BASE_DEADLINES_S: Mapping[Shape, float] = MappingProxyType(
    {Shape(256, 256): 1.5, Shape(512, 512): 2.0, Shape(1024, 1024): 3.0, Shape(2048, 2048): 5.0}
)
"""Seconds at scale 1 (TetriServe, 6.1)."""


class DeadlineRule(Protocol):
    def slo_s(self, request: Request) -> float:
        """Seconds from arrival to deadline; the request's own deadline is not looked at."""
        ...


@dataclass(frozen=True)
class TableRule:
    """Base deadlines by size, times `scale`.

    The paper gives square sizes only. Another size takes its place between the two nearest by number of pixels, on the
    line through them; outside the table's range there is no deadline to give.
    """

    scale: float = 1.0
    base_s: Mapping[Shape, float] = field(default_factory=lambda: BASE_DEADLINES_S)

    def __post_init__(self) -> None:
        check_range("slo-scale", self.scale, *SLO_SCALES)

    def slo_s(self, request: Request) -> float:
        """
        Raises:
            ConfigError: the shape is smaller or larger than all of the table.
        """
        return self.scale * self._base_s(request.shape)

    def _base_s(self, shape: Shape) -> float:
        if shape in self.base_s:
            return self.base_s[shape]
        points = sorted((known.num_pixels, base_s) for known, base_s in self.base_s.items())
        right = bisect_left(points, (shape.num_pixels, 0.0))
        if right == len(points) or (right == 0 and points[0][0] != shape.num_pixels):
            smallest, largest = min(self.base_s), max(self.base_s)
            raise ConfigError(
                f"no deadline is known for {shape}, only from {smallest} to {largest}; set --slo-multiple instead"
            )
        (x1, y1) = points[right]
        if x1 == shape.num_pixels:
            return y1
        (x0, y0) = points[right - 1]
        return y0 + (y1 - y0) * (shape.num_pixels - x0) / (x1 - x0)


@dataclass(frozen=True)
class MultipleRule:
    """A multiple of what the request takes alone at its narrowest degree: encode, all steps and decode."""

    multiple: float
    cost: CostModel

    def __post_init__(self) -> None:
        check_range("slo-multiple", self.multiple, *SLO_SCALES)

    def slo_s(self, request: Request) -> float:
        return self.multiple * narrowest_s(self.cost, request)


@dataclass(frozen=True)
class RuleByModel:
    """Each model's own rule; `rules` are by the keys that requests name models with."""

    rules: Mapping[str, DeadlineRule]

    def slo_s(self, request: Request) -> float:
        return of_model(self.rules, request.model).slo_s(request)


def slack_s(
    shapes: Sequence[Shape],
    cost: CostModel,
    deadlines: DeadlineRule,
    num_steps: int,
    *,
    num_passes: int = 1,
    model: str = "",
) -> float:
    """How long a request of the smallest of `shapes` can wait: its deadline less its time alone at its best degree.

    Negative when it cannot be in time at all; infinite when `deadlines` has none for it.
    """
    shape = min(shapes, key=lambda shape: shape.num_pixels)
    request = probe(shape, num_steps, num_passes, model)
    try:
        return deadlines.slo_s(request) - fastest_s(cost, request)
    except ConfigError:
        return math.inf
