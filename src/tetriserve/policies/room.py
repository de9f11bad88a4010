"""Idle ranks, counted and given away such that no stage comes to a rank that may not run it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from functools import lru_cache
from itertools import chain, combinations
from typing import Protocol, TypeVar

from tetriserve.core.cluster import ANYWHERE, StageRanks
from tetriserve.core.plan import Plan, State, Task
from tetriserve.core.request import Lora
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.placement import NO_LORAS, place


class _HasTrajectory(Protocol):
    @property
    def trajectory(self) -> Trajectory: ...


_Short = TypeVar("_Short", bound=_HasTrajectory)


class Room:
    """The idle ranks at one event: policies `take` as many as they want for each kind of stage, and then `place` them.

    Ranks that are taken are a number; which ones they are is decided as they are placed, out of those that the other
    kinds can spare. Any order of both is allowed. What is taken can always be placed: for any set of kinds, the ranks
    taken for them are no more than the idle ranks that may run one of them (Hall's theorem).

    loras: see `State.loras`.
    num_free: idle ranks that are not taken.
    """

    def __init__(
        self, idle: Iterable[int], stage_ranks: StageRanks = ANYWHERE, loras: Mapping[int, Lora] = NO_LORAS
    ) -> None:
        self._idle = set(idle)
        self._loras = loras
        self.num_free = len(self._idle)
        self._limits = stage_ranks.by_kind
        self._taken = dict.fromkeys(self._limits, 0)  # only what is limited counts by kind
        self._unions: Mapping[frozenset[str], frozenset[int]] = unions(stage_ranks) if stage_ranks else {}

    @classmethod
    def of(cls, state: State) -> Room:
        return cls(state.idle_ranks, state.stage_ranks, state.loras)

    def free_for(self, kind: str) -> int:
        """How many more ranks can be taken for stages of this kind."""
        free = self.num_free
        if kind in self._limits:
            for kinds, ranks in self._unions.items():
                if kind in kinds:
                    free = min(free, len(self._idle & ranks) - sum(self._taken[each] for each in kinds))
        return free

    def take(self, kind: str, num_ranks: int = 1) -> bool:
        """Take ranks for a task of this kind, if there are as many."""
        if num_ranks > self.free_for(kind):
            return False
        self.give(kind, -num_ranks)
        return True

    def take_each(self, stages: Iterable[_Short]) -> list[_Short]:
        """Take a rank for each of these short stages, in their order; those that got one."""
        got = []
        for stage in stages:
            if not self.num_free:
                break
            if self.take(stage.trajectory.stage.kind):
                got.append(stage)
        return got

    def give(self, kind: str, num_ranks: int) -> None:
        """Ranks that were taken for this kind are free again."""
        self.num_free += num_ranks
        if kind in self._limits:
            self._taken[kind] -= num_ranks

    @property
    def is_limited(self) -> bool:
        """Whether it depends on the kind of stage how many ranks can be taken."""
        return bool(self._limits)

    def within(self, trajectories: Iterable[Trajectory]) -> int:
        """How many more ranks tasks of all these together can take, whatever each of them gets."""
        if not self._limits:
            return self.num_free
        kinds = {trajectory.stage.kind for trajectory in trajectories}
        return min((self.free_for(kind) for kind in kinds), default=self.num_free)

    def place(
        self, wanted: Sequence[tuple[Trajectory, int]], *, team_s: float, preserve: bool = True
    ) -> list[tuple[int, ...]]:
        """The ranks of tasks, pairs of a trajectory and its degree, that were taken before; see `placement.place`."""
        if not self._limits:
            placed = place(wanted, self._idle, team_s=team_s, preserve=preserve, loras=self._loras)
        else:
            placed = self._place_by_kind(wanted, team_s, preserve)
        self._idle.difference_update(*placed)
        for trajectory, degree in wanted:
            if trajectory.stage.kind in self._limits:
                self._taken[trajectory.stage.kind] -= degree
        return placed

    def _place_by_kind(
        self, wanted: Sequence[tuple[Trajectory, int]], team_s: float, preserve: bool
    ) -> list[tuple[int, ...]]:
        placed: dict[int, tuple[int, ...]] = {}
        rest = Room(self._idle)
        rest._limits, rest._taken, rest._unions = self._limits, dict(self._taken), self._unions
        for kind in dict.fromkeys(trajectory.stage.kind for trajectory, _ in wanted):
            indices = [index for index, (trajectory, _) in enumerate(wanted) if trajectory.stage.kind == kind]
            pool = rest._pool_for(kind)
            spared = frozenset(chain.from_iterable(self._limits[other] for other in self._limits if other != kind))
            sets = place(
                [wanted[index] for index in indices],
                pool,
                team_s=team_s,
                preserve=preserve,
                spared=spared,
                loras=self._loras,
            )
            placed.update(zip(indices, sets, strict=True))
            for ranks in sets:
                rest._idle.difference_update(ranks)
                if kind in rest._taken:
                    rest._taken[kind] -= len(ranks)
        return [placed[index] for index in range(len(wanted))]

    def _pool_for(self, kind: str) -> set[int]:
        """Idle ranks, any of which may be given to stages of this kind: those kept back suffice for the others."""
        left, taken = set(self._idle), dict(self._taken)
        own = self._limits.get(kind, self._idle)
        for other, number in self._taken.items():
            for _ in range(number if other != kind else 0):
                taken[other] -= 1
                # Those that this kind could not use go first.
                candidates = sorted(left & self._limits[other], key=lambda rank: (rank in own, rank))
                left.remove(next(rank for rank in candidates if self._suffice(left - {rank}, taken)))
        return left & own

    def _suffice(self, ranks: Set[int], taken: dict[str, int]) -> bool:
        return all(len(ranks & union) >= sum(taken[kind] for kind in kinds) for kinds, union in self._unions.items())


@lru_cache(maxsize=64)
def unions(stage_ranks: StageRanks) -> Mapping[frozenset[str], frozenset[int]]:
    """For each set of limited kinds, the ranks that may run one of them. Every other set of kinds has all ranks."""
    kinds = tuple(stage_ranks.by_kind)
    subsets = chain.from_iterable(combinations(kinds, size) for size in range(1, len(kinds) + 1))
    return {
        frozenset(subset): frozenset(chain.from_iterable(stage_ranks.by_kind[kind] for kind in subset))
        for subset in subsets
    }


def within_limits(plan: Plan, state: State) -> Plan:
    """`plan` if all of its tasks are on ranks that may run them; else with its tasks on other ranks, as many as there
    are ranks for, those of limited kinds first. So policies that do not know of limits keep to them.

    What else is wrong with a plan is left as it is.
    """
    if not state.stage_ranks or all(state.stage_ranks.allows(task.stage, task.ranks) for task in plan.tasks):
        return plan
    waiting = {trajectory.request_id: trajectory for trajectory in state.waiting}
    if not all(task.members and _is_next(task, waiting.get(task.members[0])) for task in plan.tasks):
        return plan
    room, limited = Room.of(state), state.stage_ranks.by_kind
    kept = [
        task
        for task in sorted(plan.tasks, key=lambda task: task.stage not in limited)
        if room.take(task.stage, task.degree)
    ]
    placed = room.place([(waiting[task.members[0]], task.degree) for task in kept], team_s=state.cost.team_s)
    moved = [Task(task.members, task.stage, ranks, task.num_steps) for task, ranks in zip(kept, placed, strict=True)]
    return Plan(tuple(moved), plan.wake_at)


def _is_next(task: Task, trajectory: Trajectory | None) -> bool:
    return trajectory is not None and trajectory.stage.kind == task.stage
