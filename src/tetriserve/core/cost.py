"""What follows from a cost model: times of tasks and of whole requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping

from tetriserve.core.cluster import Nodes
from tetriserve.core.plan import CostModel, Task
from tetriserve.core.request import Request, Stage

MIN_SAVING = 0.08
"""What a member of a batch saves at least of the GPU time that its step takes alone: what is measured varies, and who
shares a task waits for the slowest."""


def times_per_step(cost: CostModel, request: Request, batch: int = 1) -> Mapping[int, float]:
    """Seconds per step by degree, ascending, of the stage of `request` that has steps."""
    return cost.times(request, request.stepped, batch)


def times_for(cost: CostModel, task: Task, request: Request) -> Mapping[int, float]:
    """Seconds by degree of a step of `task`, or of all of it if it has no steps."""
    return cost.times(request, request.stage_of(task.stage), task.batch)


def task_s(cost: CostModel, task: Task, request: Request) -> float:
    """Seconds that the ranks of `task` compute, of which `request` is a member; starting it comes on top."""
    times = times_for(cost, task, request)
    return max(1, task.num_steps) * times[task.degree]


def stage_s(cost: CostModel, request: Request, stage: Stage, degree: int) -> float:
    """Seconds of a whole stage at one degree, in one task, without its start."""
    return max(1, stage.num_steps) * cost.times(request, stage)[degree]


def move_s(cost: CostModel, last: Collection[int], ranks: Collection[int], nodes: Nodes) -> float:
    """What it costs a request that was on the ranks `last` (none if it has no state yet) to go on with `ranks`."""
    if not last or set(last) == set(ranks):
        return 0.0
    return cost.move_s if nodes.share([*last, *ranks]) else cost.move_node_s


def narrowest_s(cost: CostModel, request: Request) -> float:
    """Seconds of `request` alone, each stage at its narrowest degree, without starts."""
    return sum(stage_s(cost, request, stage, min(cost.times(request, stage))) for stage in request.stages)


def fastest_s(
    cost: CostModel, request: Request, num_ranks_for: Callable[[Request, Stage], float] = lambda *_: math.inf
) -> float:
    """Seconds of `request` alone, each stage at its fastest degree, or its narrowest, on `num_ranks_for` it."""
    total_s = 0.0
    for stage in request.stages:
        times = cost.times(request, stage)
        widest = max(num_ranks_for(request, stage), min(times))
        total_s += max(1, stage.num_steps) * min(step_s for degree, step_s in times.items() if degree <= widest)
    return total_s


def stages_gpu_s(cost: CostModel, request: Request, stages: Iterable[Stage]) -> float:
    """Rank-seconds of `stages` of a request, each at its cheapest degree."""
    return sum(max(1, stage.num_steps) * step_gpu_s(cost, request, stage) for stage in stages)


def step_gpu_s(cost: CostModel, request: Request, stage: Stage, num_ranks: float = math.inf) -> float:
    """Rank-seconds of one step of a stage, or of all of a short one, at its cheapest degree on `num_ranks`, or at its
    narrowest on fewer."""
    times = cost.times(request, stage)
    widest = max(num_ranks, min(times))
    return min(degree * step_s for degree, step_s in times.items() if degree <= widest)


def pays(step_s: float, batch: int, alone_s: float) -> bool:
    """Whether a step of `batch` members, in `step_s`, saves each of them enough."""
    return step_s <= (1 - MIN_SAVING) * batch * alone_s
