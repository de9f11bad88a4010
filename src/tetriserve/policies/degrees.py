"""Which degrees are worth considering, from their step times alone."""

from __future__ import annotations

from collections.abc import Mapping

from tetriserve.core.cost import stages_gpu_s, times_per_step
from tetriserve.core.plan import CostModel
from tetriserve.core.request import Request

EfficientDegree = tuple[int, float, float]
"""Degree, seconds per step, GPU seconds per step."""


def efficient_degrees(step_times: Mapping[int, float]) -> tuple[EfficientDegree, ...]:
    """Degrees on the Pareto front of step time and GPU time, cheapest (and slowest) first.

    A dominated degree never belongs to a best mix: its steps would be faster at no more GPU time elsewhere.
    """
    front: list[EfficientDegree] = []
    by_cost = sorted((degree * step_s, step_s, degree) for degree, step_s in step_times.items())
    for gpu_s, step_s, degree in by_cost:
        if not front or step_s < front[-1][1]:
            front.append((degree, step_s, gpu_s))
    return tuple(front)


def fastest_degree(step_times: Mapping[int, float]) -> int:
    """The degree with the shortest step; the narrower one of equals."""
    return min(step_times, key=lambda degree: (step_times[degree], degree))


def least_gpu_s(request: Request, num_steps: int, cost: CostModel) -> float:
    """Rank-seconds of `num_steps` steps at the cheapest degree, and of the stages after them at theirs."""
    steps_s = min(degree * step_s for degree, step_s in times_per_step(cost, request).items())
    after = request.stages[request.stages.index(request.stepped) + 1 :]
    return num_steps * steps_s + stages_gpu_s(cost, request, after)
