"""The least GPU time that one request must spend inside an interval, whoever schedules it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tetriserve.core.cost import stages_gpu_s, times_per_step
from tetriserve.core.plan import CostModel
from tetriserve.core.request import Request, Stage

Floats = npt.NDArray[np.float64]

SLACK_S = 1e-6
"""Windows count as this much longer than they are, so that rounding never makes a possible request impossible."""


@dataclass(frozen=True)
class Chain:
    """A request's work as an unbroken chain, in seconds at the fastest: a head and a tail on one rank, steps between.

    head_s: encode with the start of its task, and the start of the first denoise task.
    tail_s: decode with the start of its task.
    times_s, costs_s: corners of the lower convex hull of (seconds, GPU seconds) per step, fastest first.
    """

    head_s: float
    tail_s: float
    num_steps: int
    times_s: tuple[float, ...]
    costs_s: tuple[float, ...]

    @property
    def fastest_s(self) -> float:
        """Seconds that the whole chain takes without a pause, at its fastest degree."""
        return self.head_s + self.num_steps * self.times_s[0] + self.tail_s

    def least_work(self, window_s: Floats | float, left_s: Floats | float, right_s: Floats | float) -> Floats:
        """GPU seconds inside an interval that leaves `left_s` of the window before it and `right_s` after it.

        The three broadcast; `window_s` must be at least `fastest_s`. Where the interval does not touch the window the
        answer is 0. Proof: see `simulator.bound`.
        """
        left, right = np.asarray(left_s, dtype=float), np.asarray(right_s, dtype=float)
        inside = window_s - left - right
        fastest = self.fastest_s
        # What is left of the chain, [first, last] on its own time axis, when both ends outside take all they can.
        first, last = left, fastest - right
        head = np.clip(np.minimum(last, self.head_s) - first, 0.0, None)
        tail = np.clip(last - np.maximum(first, fastest - self.tail_s), 0.0, None)
        denoise = np.minimum(last, fastest - self.tail_s) - np.maximum(first, self.head_s)
        steps = np.clip(denoise, 0.0, None) / self.times_s[0]
        # Dividing by no steps is harmless: they then cost nothing at any pace.
        pace = (inside - head - tail) / np.maximum(steps, 1e-12)
        work = head + tail + steps * np.interp(pace, self.times_s, self.costs_s)
        return np.where((inside > 0) & (last > first), work, 0.0)


def chain_of(request: Request, cost: CostModel, num_ranks: int) -> Chain | None:
    """The chain of `request` on a pool of `num_ranks`; None when no degree of its shape fits on the pool."""
    points = sorted(
        (step_s, degree * step_s / batch)
        for batch in range(1, cost.max_batch + 1)
        for degree, step_s in times_per_step(cost, request, batch).items()
        if degree <= num_ranks
    )
    if not points:
        return None
    index = request.stages.index(request.stepped)
    corners = _convex_hull(_falling(points))
    start_s = cost.switch_s if cost.max_batch == 1 else 0.0  # of the first task of steps, which many may share
    return Chain(
        head_s=start_s + sum(_short_s(cost, request, stage) for stage in request.stages[:index]),
        tail_s=sum(_short_s(cost, request, stage) for stage in request.stages[index + 1 :]),
        num_steps=request.num_steps,
        times_s=tuple(step_s for step_s, _ in corners),
        costs_s=tuple(gpu_s for _, gpu_s in corners),
    )


def _short_s(cost: CostModel, request: Request, stage: Stage) -> float:
    """With the time to start it."""
    return cost.switch_s + stages_gpu_s(cost, request, [stage])


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
