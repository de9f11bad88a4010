"""Plans kept inside nodes: policies count ranks, and a task for which no node has room runs narrower, or later."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from tetriserve.core.cost import stages_gpu_s, times_for
from tetriserve.core.plan import Plan, State, Task
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.placement import best_node
from tetriserve.policies.room import Room

_Placed = list[tuple[Task, Trajectory]]


def within_nodes(plan: Plan, state: State, now: float) -> Plan:
    """`plan` if the ranks of each of its tasks share a node; else all of its tasks placed anew, widest first.

    A task for which no node has room runs at the fastest degree for which one has. It waits if there is none, or if its
    request would then be late and will not if it waits: the node that will have room first takes no other task, so that
    narrow tasks cannot hold it up for ever. What else is wrong with a plan is left as it is.
    """
    if not state.nodes.are_several or all(state.nodes.share(task.ranks) for task in plan.tasks):
        return plan
    waiting = {trajectory.request_id: trajectory for trajectory in state.waiting}
    if not all(task.members and task.members[0] in waiting for task in plan.tasks):
        return plan
    tasks = [(task, waiting[task.members[0]]) for task in plan.tasks]
    return replace(plan, tasks=tuple(_Floors(state, now).place(tasks)))


class _Floors:
    """The idle ranks of each node at one event."""

    def __init__(self, state: State, now: float) -> None:
        self._state = state
        self._now = now
        self._rooms = {
            node: Room(ranks, state.stage_ranks, state.loras)
            for node, ranks in state.nodes.by_node(state.idle_ranks).items()
        }
        self._placed: dict[int, _Placed] = {node: [] for node in self._rooms}
        self._open = set(self._rooms)

    def place(self, tasks: _Placed) -> list[Task]:
        too_wide: _Placed = []
        for task, trajectory in sorted(tasks, key=self._order):
            if not self._put(task, trajectory) and not self._waits(task, trajectory):
                too_wide.append((task, trajectory))
        for task, trajectory in too_wide:
            narrower = self._narrower(task, trajectory)
            if narrower is not None:
                self._put(narrower, trajectory)
        placed = []
        for node, room in self._rooms.items():
            mine = self._placed[node]
            sets = room.place([(one, task.degree) for task, one in mine], team_s=self._state.cost.team_s)
            placed += [
                Task(task.members, task.stage, ranks, task.num_steps)
                for (task, _), ranks in zip(mine, sets, strict=True)
            ]
        return placed

    def _order(self, pair: tuple[Task, Trajectory]) -> tuple[int, bool, bool]:
        task, trajectory = pair
        is_limited = self._state.stage_ranks.role(trajectory.request.model, task.stage) is not None
        return -task.degree, not is_limited, len(trajectory.holders) != task.degree

    def _put(self, task: Task, trajectory: Trajectory) -> bool:
        home = self._state.nodes.of(trajectory.holders[0]) if trajectory.holders else None
        node = best_node(task.degree, home, self._room_for(trajectory))
        if node is None:
            return False
        self._rooms[node].take(trajectory, task.degree)
        self._placed[node].append((task, trajectory))
        return True

    def _room_for(self, trajectory: Trajectory) -> Mapping[int, int]:
        return {node: self._rooms[node].free_for(trajectory) for node in self._open}

    def _narrower(self, task: Task, trajectory: Trajectory) -> Task | None:
        """The task at the degree that is fastest where there is room, for no longer than it would have taken."""
        times = times_for(self._state.cost, task, trajectory.request)
        most = max(self._room_for(trajectory).values(), default=0)
        fitting = {degree: seconds for degree, seconds in times.items() if degree <= min(most, task.degree)}
        if not fitting:
            return None
        degree = min(fitting, key=lambda degree: (fitting[degree], degree))
        num_steps = task.num_steps
        if num_steps and task.degree in times:
            num_steps = max(1, min(num_steps, int(num_steps * times[task.degree] / times[degree])))
        return Task(task.members, task.stage, task.ranks[:degree], num_steps)

    def _waits(self, task: Task, trajectory: Trajectory) -> bool:
        """Whether a task that fits nowhere as wide as it is starts later; the node that it waits for is then closed."""
        narrower = self._narrower(task, trajectory)
        times = times_for(self._state.cost, task, trajectory.request)
        need = min(times) if narrower is None else task.degree
        allowed = self._state.stage_ranks.among(trajectory.request.model, task.stage, self._state.ranks)
        ready_s = {
            node: self._ready_s(frozenset(ranks), need)
            for node, ranks in self._state.nodes.by_node(allowed).items()
            if node in self._open or node not in self._rooms
        }
        first = min(ready_s, key=lambda node: (ready_s[node], node), default=None)
        if narrower is not None:
            request, num_steps = trajectory.request, trajectory.remaining_steps if task.num_steps else 1
            later = request.stages[trajectory.stage_index + 1 :]
            by_s = request.deadline_s - stages_gpu_s(self._state.cost, request, later)
            if first is None or self._now + num_steps * times[narrower.degree] <= by_s:
                return False
            if ready_s[first] + num_steps * min(times.values()) > by_s:
                return False
        if first is not None and ready_s[first] < math.inf:
            self._open.discard(first)
        return True

    def _ready_s(self, ranks: frozenset[int], num_ranks: int) -> float:
        """When so many of `ranks`, of one node, will be idle if nothing else starts there."""
        num_idle = len(ranks.intersection(self._state.idle_ranks))
        for flight in sorted(self._state.in_flight, key=lambda flight: flight.end_s):
            if num_idle >= num_ranks:
                break
            num_idle += len(ranks.intersection(flight.task.ranks))
            if num_idle >= num_ranks:
                return flight.end_s
        return self._now if num_idle >= num_ranks else math.inf
