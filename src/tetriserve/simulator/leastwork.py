"""The least GPU time that one request must spend inside an interval, whoever schedules it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tetriserve.core.plan import CostModel
from tetriserve.core.request import Request, Stage

Floats = npt.NDArray[np.float64]

SLACK_S = 1e-6
"""Windows count as this much longer than they are, so that rounding never makes a possible request impossible."""


@dataclass(frozen=True)
class Leg:
    """One stage of a request, or what starts it.

    num_steps: 1 for a short stage.
    times_s, costs_s: corners of the lower convex hull of (seconds, GPU seconds) per step, fastest first.
    """

    num_steps: int
    times_s: tuple[float, ...]
    costs_s: tuple[float, ...]

    @property
    def fastest_s(self) -> float:
        return self.num_steps * self.times_s[0]

    @property
    def has_one_pace(self) -> bool:
        return len(self.times_s) == 1


@dataclass(frozen=True)
class Chain:
    """A request's work as an unbroken chain of legs."""

    legs: tuple[Leg, ...]

    @cached_property
    def fastest_s(self) -> float:
        """Seconds that the whole chain takes without a pause, each leg at its fastest degree."""
        return sum(leg.fastest_s for leg in self.legs)

    @cached_property
    def _savings(self) -> tuple[tuple[float, float, int], ...]:
        """Edges of the legs' hulls: GPU seconds saved by each second more, seconds per step, and the leg. Best first.

        Within a leg that is from its fastest corner to its slowest, because hulls are convex.
        """
        edges = [
            ((leg.costs_s[at] - leg.costs_s[at + 1]) / (leg.times_s[at + 1] - leg.times_s[at]),
             leg.times_s[at + 1] - leg.times_s[at], number)
            for number, leg in enumerate(self.legs)
            for at in range(len(leg.times_s) - 1)
        ]  # fmt: skip
        return tuple(sorted(edges, key=lambda edge: -edge[0]))

    def least_work(self, window_s: Floats | float, left_s: Floats | float, right_s: Floats | float) -> Floats:
        """GPU seconds inside an interval that leaves `left_s` of the window before it and `right_s` after it.

        The three broadcast; `window_s` must be at least `fastest_s`. Where the interval does not touch the window the
        answer is 0. Proof: see `simulator.bound`.
        """
        left, right = np.asarray(left_s, dtype=float), np.asarray(right_s, dtype=float)
        inside = window_s - left - right
        # What is left of the chain, [first, last] on its own time axis, when both ends outside take all they can.
        first, last = left, self.fastest_s - right
        slack = np.clip(inside - np.clip(last - first, 0.0, None), 0.0, None)
        work = np.zeros(np.broadcast_shapes(np.shape(inside), np.shape(last)))
        steps = []  # of each leg, perhaps fractions
        start_s = 0.0
        for leg in self.legs:
            end_s = start_s + leg.fastest_s
            steps.append(np.clip(np.minimum(last, end_s) - np.maximum(first, start_s), 0.0, None) / leg.times_s[0])
            work = work + steps[-1] * leg.costs_s[0]
            start_s = end_s
        for saved, step_s, number in self._savings:
            taken = np.minimum(slack, steps[number] * step_s)
            work, slack = work - taken * saved, slack - taken
        return np.where((inside > 0) & (last > first), work, 0.0)


def chain_of(request: Request, cost: CostModel, num_ranks: int) -> Chain | None:
    """The chain of `request` on a pool of `num_ranks`; None when no degree of a stage fits on the pool."""
    legs: list[Leg] = []
    for stage in request.stages:
        if stage.num_steps and cost.max_batch == 1:  # else many may share the start of the first task of steps
            legs.append(_hull(1, [(cost.switch_s, cost.switch_s)]))
        points = (_step_points if stage.num_steps else _short_points)(request, stage, cost, num_ranks)
        if not points:
            return None
        legs.append(_hull(max(1, stage.num_steps), points))
    return Chain(tuple(_joined(leg for leg in legs if leg.fastest_s > 0)))


def _step_points(request: Request, stage: Stage, cost: CostModel, num_ranks: int) -> list[tuple[float, float]]:
    """Seconds and GPU seconds of one step at each degree and in each batch."""
    return [
        (step_s, degree * step_s / batch)
        for batch in range(1, cost.max_batch + 1)
        for degree, step_s in cost.times(request, stage, batch).items()
        if degree <= num_ranks
    ]


def _short_points(request: Request, stage: Stage, cost: CostModel, num_ranks: int) -> list[tuple[float, float]]:
    """Seconds and GPU seconds of a short stage at each degree, with the time to start its task."""
    taken = ((degree, cost.switch_s + seconds) for degree, seconds in cost.times(request, stage).items())
    return [(seconds, degree * seconds) for degree, seconds in taken if degree <= num_ranks]


def _hull(num_steps: int, points: Iterable[tuple[float, float]]) -> Leg:
    corners = _convex_hull(_falling(sorted(points)))
    return Leg(num_steps, tuple(seconds for seconds, _ in corners), tuple(gpu_s for _, gpu_s in corners))


def _joined(legs: Iterable[Leg]) -> list[Leg]:
    """The same chain with neighbours that run on one rank as one leg: fewer legs take less time to evaluate."""
    joined: list[Leg] = []
    for leg in legs:
        if joined and all(part.has_one_pace and part.times_s == part.costs_s for part in (joined[-1], leg)):
            seconds = (joined.pop().fastest_s + leg.fastest_s,)
            leg = Leg(1, seconds, seconds)
        joined.append(leg)
    return joined


def _falling(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of `points`, sorted by x, whose y is below that of all before."""
    kept: list[tuple[float, float]] = []
    for x, y in points:
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept


def _convex_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower hull of points that are sorted by x and fall in y."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull
