"""Deadline-aware allocation of degrees to the remaining steps of one request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tetriserve.policies.degrees import EfficientDegree, efficient_degrees

EPSILON_S = 1e-9
"""Rounding slack in comparisons of sums of seconds: a budget that is met exactly is met."""


@dataclass(frozen=True, slots=True)
class Segment:
    """`num_steps` steps at `degree`."""

    num_steps: int
    degree: int


def deadline_aware_allocation(
    num_steps: int, budget_s: float, step_times: Mapping[int, float]
) -> tuple[Segment, ...] | None:
    """The cheapest way to run `num_steps` steps within `budget_s`: TetriServe, section 4.2.1.

    Minimises GPU time, the sum of steps * degree * T(degree), subject to the sum of steps * T(degree) <= `budget_s`,
    over all mixes of at most two degrees. Equal GPU times are settled by fewer degrees, then by the faster finish.

    Args:
        num_steps: remaining steps, at least 1.
        budget_s: seconds in which they must be done.
        step_times: seconds per step by degree.

    Returns:
        One or two segments, the faster degree first: time gained early stays available as slack, whereas a plan that
        saves the fast part for the end depends on wide groups being free then. None when even the fastest degree
        misses the budget.
    """
    return cheapest_mix(num_steps, budget_s, efficient_degrees(step_times))


def cheapest_mix(num_steps: int, budget_s: float, efficient: Sequence[EfficientDegree]) -> tuple[Segment, ...] | None:
    """`deadline_aware_allocation` over degrees that are already reduced to the efficient ones, cheapest first.

    A mix of two degrees is needed only between one that alone misses the budget and one that alone meets it: the steps
    at the fast one are then the fewest that bring the sum down to the budget.
    """
    budget_s += EPSILON_S
    cheapest_degree, cheapest_s, _ = efficient[0]
    if num_steps * cheapest_s <= budget_s:
        return (Segment(num_steps, cheapest_degree),)
    if num_steps * efficient[-1][1] > budget_s:
        return None

    best: tuple[float, bool, float] | None = None
    best_mix = (0, 0, 0)
    for fast, fast_s, fast_gpu_s in efficient:
        if num_steps * fast_s > budget_s:
            continue
        for slow, slow_s, slow_gpu_s in efficient:
            excess_s = num_steps * slow_s - budget_s
            if excess_s <= 0:
                break
            num_fast = min(num_steps, math.ceil(excess_s / (slow_s - fast_s)))
            num_slow = num_steps - num_fast
            finish_s = num_fast * fast_s + num_slow * slow_s
            key = (num_fast * fast_gpu_s + num_slow * slow_gpu_s, num_slow > 0, finish_s)
            if best is None or key < best:
                best, best_mix = key, (num_fast, fast, slow)
    num_fast, fast, slow = best_mix
    if num_fast == num_steps:
        return (Segment(num_steps, fast),)
    return Segment(num_fast, fast), Segment(num_steps - num_fast, slow)
