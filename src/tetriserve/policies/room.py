"""Idle ranks, counted and given away such that no stage comes to a rank that may not run it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import chain

from tetriserve.core.cluster import ANYWHERE, ONE_NODE, Nodes, Role, StageRanks
from tetriserve.core.plan import Plan, State, Task
from tetriserve.core.request import Lora
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.placement import NO_LORAS, place, place_in_nodes


class Room:
    """The idle ranks at one event: policies `take` as many as they want for the stages that trajectories are at, and
    then `place` them.

    Ranks that are taken are a number; which ones they are is decided as they are placed, out of those that stages of
    other roles can spare. Any order of both is allowed. What is taken can always be placed: see `StageRanks.unions`.

    loras: see `State.loras`. nodes: ranks are placed inside them as far as they have room; see `place_in_nodes`.
    num_free: idle ranks that are not taken.
    """

    def __init__(
        self,
        idle: Iterable[int],
        stage_ranks: StageRanks = ANYWHERE,
        loras: Mapping[int, Lora] = NO_LORAS,
        nodes: Nodes = ONE_NODE,
    ) -> None:
        self._nodes = nodes
        self._idle = set(idle)
        self._loras = loras
        self.num_free = len(self._idle)
        self._stage_ranks = stage_ranks
        self._taken: dict[Role, int] = {}  # what every rank may run does not count

    @classmethod
    def of(cls, state: State) -> Room:
        return cls(state.idle_ranks, state.stage_ranks, state.loras, state.nodes)

    def role_of(self, trajectory: Trajectory) -> Role | None:
        """The ranks that may run the stage that a trajectory is at; None for every rank."""
        return self._stage_ranks.role(trajectory.request.model, trajectory.stage.kind) if self._stage_ranks else None

    def free_for(self, trajectory: Trajectory) -> int:
        """How many more ranks can be taken for the trajectory."""
        return self._free_for(self.role_of(trajectory))

    def take(self, trajectory: Trajectory, num_ranks: int = 1) -> bool:
        """Take ranks for a task of the trajectory, if there are as many."""
        role = self.role_of(trajectory)
        if num_ranks > self._free_for(role):
            return False
        self._take(role, num_ranks)
        return True

    def give(self, trajectory: Trajectory, num_ranks: int) -> None:
        """Ranks that were taken for the trajectory are free again."""
        self._take(self.role_of(trajectory), -num_ranks)

    @property
    def is_limited(self) -> bool:
        """Whether it depends on the stage how many ranks can be taken."""
        return bool(self._stage_ranks)

    def within(self, trajectories: Iterable[Trajectory]) -> int:
        """How many more ranks tasks of all these together can take, whatever each of them gets."""
        if not self._stage_ranks:
            return self.num_free
        roles = {self.role_of(trajectory) for trajectory in trajectories}
        return min((self._free_for(role) for role in roles), default=self.num_free)

    def place(
        self, wanted: Sequence[tuple[Trajectory, int]], *, team_s: float, preserve: bool = True
    ) -> list[tuple[int, ...]]:
        """The ranks of tasks, pairs of a trajectory and its degree, that were taken before; see `placement.place`."""
        if not self._stage_ranks:
            if self._nodes.are_several:
                placed = place_in_nodes(
                    wanted, self._idle, self._nodes, team_s=team_s, preserve=preserve, loras=self._loras
                )
            else:
                placed = place(wanted, self._idle, team_s=team_s, preserve=preserve, loras=self._loras)
            self._idle.difference_update(*placed)
            return placed
        by_role: dict[Role | None, list[int]] = {}
        for index, (trajectory, _) in enumerate(wanted):
            by_role.setdefault(self.role_of(trajectory), []).append(index)
        found: dict[int, tuple[int, ...]] = {}
        for role, indices in by_role.items():
            spared = frozenset(chain.from_iterable(other for other in self._stage_ranks.roles if other != role))
            sets = place(
                [wanted[index] for index in indices],
                self._pool_for(role),
                team_s=team_s,
                preserve=preserve,
                spared=spared,
                loras=self._loras,
            )
            found.update(zip(indices, sets, strict=True))
            self._idle.difference_update(*sets)
            if role is not None:
                self._taken[role] -= sum(map(len, sets))
        return [found[index] for index in range(len(wanted))]

    def _free_for(self, role: Role | None) -> int:
        free = self.num_free
        if role is not None:
            for union in self._stage_ranks.unions:
                if role <= union:
                    free = min(free, len(self._idle & union) - self._taken_in(union, self._taken))
        return free

    def _take(self, role: Role | None, num_ranks: int) -> None:
        self.num_free -= num_ranks
        if role is not None:
            self._taken[role] = self._taken.get(role, 0) + num_ranks

    def _pool_for(self, role: Role | None) -> set[int]:
        """Idle ranks, any of which may be given to stages of this role: those kept back suffice for the others."""
        left, taken = set(self._idle), dict(self._taken)
        own = self._idle if role is None else role
        for other, number in self._taken.items():
            for _ in range(number if other != role else 0):
                taken[other] -= 1
                # Those that this role could not use go first.
                candidates = sorted(left & other, key=lambda rank: (rank in own, rank))
                left.remove(next(rank for rank in candidates if self._suffice(left - {rank}, taken)))
        return left & own

    def _suffice(self, ranks: Set[int], taken: Mapping[Role, int]) -> bool:
        return all(len(ranks & union) >= self._taken_in(union, taken) for union in self._stage_ranks.unions)

    @staticmethod
    def _taken_in(union: Role, taken: Mapping[Role, int]) -> int:
        return sum([number for role, number in taken.items() if role <= union])


def within_limits(plan: Plan, state: State) -> Plan:
    """`plan` if all of its tasks are on ranks that may run them; else with its tasks on other ranks, as many as there
    are ranks for, those of limited stages first. So policies that do not know of limits keep to them.

    What else is wrong with a plan is left as it is.
    """
    if not state.stage_ranks:
        return plan
    waiting = {trajectory.request_id: trajectory for trajectory in state.waiting}
    if not all(task.members and _is_next(task, waiting.get(task.members[0])) for task in plan.tasks):
        return plan
    room = Room.of(state)
    tasks = [(task, waiting[task.members[0]]) for task in plan.tasks]
    roles = [(task, room.role_of(trajectory)) for task, trajectory in tasks]
    if all(role is None or role.issuperset(task.ranks) for task, role in roles):
        return plan
    kept = [
        (task, trajectory)
        for task, trajectory in sorted(tasks, key=lambda pair: room.role_of(pair[1]) is None)
        if room.take(trajectory, task.degree)
    ]
    placed = room.place([(trajectory, task.degree) for task, trajectory in kept], team_s=state.cost.team_s)
    moved = [
        Task(task.members, task.stage, ranks, task.num_steps) for (task, _), ranks in zip(kept, placed, strict=True)
    ]
    return Plan(tuple(moved), plan.wake_at)


def _is_next(task: Task, trajectory: Trajectory | None) -> bool:
    return trajectory is not None and trajectory.stage.kind == task.stage
