"""Event-driven list scheduling: requests in an order, each given ranks while some are idle (GF-DiT's policies)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from tetriserve.core.cost import stages_gpu_s
from tetriserve.core.plan import CostModel, Plan, State, Task
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.degrees import fastest_degree, least_gpu_s
from tetriserve.policies.overdue import owed
from tetriserve.policies.room import Room
from tetriserve.policies.stages import place_short_stages, urgency_order

TASK_S = 0.25
"""Length of a task of steps: a request can be overtaken, widened or narrowed at its end."""

Order = Callable[[Trajectory, CostModel], tuple[float, ...]]
"""Sort key of a waiting trajectory within its priority class."""


class _Choice(NamedTuple):
    trajectory: Trajectory
    times: Mapping[int, float]
    degree: int


class ListScheduler:
    """Gives idle ranks away in the order of `order`, within priority classes, at every event.

    What is owed to an overdue request comes first (`policies.overdue`).

    Each request gets the largest useful degree: the fastest that fits into what is left. With `best_fit` it gets the
    smallest that still meets its deadline (the fastest that fits, if none does), and ranks that remain then widen the
    requests in the same order, only where the profile says that it is faster.
    """

    def __init__(self, order: Order, *, best_fit: bool = False) -> None:
        self.order = order
        self.best_fit = best_fit

    def plan(self, state: State, now: float) -> Plan:
        cost = state.cost
        room = Room.of(state)
        short: list[tuple[Trajectory, int]] = []
        chosen: list[_Choice] = []
        head = owed(state, now)
        keyed = sorted(
            state.waiting, key=lambda t: (t is not head, t.request.priority, self.order(t, cost), urgency_order(t))
        )
        for trajectory in keyed:
            if not room.num_free:
                break
            times = cost.times(trajectory.request, trajectory.stage)
            spare = min(room.free_for(trajectory), state.num_ranks_for(trajectory.request, trajectory.stage))
            fitting = {degree: seconds for degree, seconds in times.items() if degree <= spare}
            if not fitting:
                continue
            degree = _best_fit(trajectory, fitting, cost, now) if self.best_fit else fastest_degree(fitting)
            room.take(trajectory, degree)
            if trajectory.is_short:
                short.append((trajectory, degree))
            else:
                chosen.append(_Choice(trajectory, times, degree))
        if self.best_fit:
            chosen = _widen(chosen, room)
        placed = room.place([(choice.trajectory, choice.degree) for choice in chosen], team_s=cost.team_s)
        tasks = []
        for (trajectory, times, degree), ranks in zip(chosen, placed, strict=True):
            num_steps = min(trajectory.remaining_steps, max(1, int(TASK_S / times[degree])))
            tasks.append(Task((trajectory.request_id,), trajectory.stage.kind, ranks, num_steps))
        return Plan((*tasks, *place_short_stages(short, room, team_s=cost.team_s)))


def _best_fit(trajectory: Trajectory, fitting: Mapping[int, float], cost: CostModel, now: float) -> int:
    request = trajectory.request
    after_s = stages_gpu_s(cost, request, request.stages[trajectory.stage_index + 1 :])
    budget_s = request.deadline_s - now - after_s - 2 * cost.switch_s
    num_steps = 1 if trajectory.is_short else trajectory.remaining_steps
    enough = [degree for degree, step_s in fitting.items() if num_steps * step_s <= budget_s]
    return min(enough) if enough else fastest_degree(fitting)


def _widen(chosen: list[_Choice], room: Room) -> list[_Choice]:
    widened = []
    for choice in chosen:
        spare = room.free_for(choice.trajectory)
        reachable = {degree: step_s for degree, step_s in choice.times.items() if 0 <= degree - choice.degree <= spare}
        degree = fastest_degree(reachable)
        room.take(choice.trajectory, degree - choice.degree)
        widened.append(choice._replace(degree=degree))
    return widened


def earliest_deadline(trajectory: Trajectory, cost: CostModel) -> tuple[float, ...]:
    """`edf` and `edf-best-fit`."""
    return (trajectory.request.deadline_s,)


def shortest_remaining(trajectory: Trajectory, cost: CostModel) -> tuple[float, ...]:
    """`srtf`: least GPU time left; a shorter request overtakes at the end of a task."""
    return (least_gpu_s(trajectory.request, trajectory.remaining_steps, cost),)


def shortest_job(trajectory: Trajectory, cost: CostModel) -> tuple[float, ...]:
    """`sjf`: least GPU time in all, behind those that have started: non-preemptive."""
    return (not trajectory.has_started, least_gpu_s(trajectory.request, trajectory.request.num_steps, cost))
