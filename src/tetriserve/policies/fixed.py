"""Baselines in the way of xDiT: requests in order of arrival, each alone on its block of ranks until it is done."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from itertools import chain

from tetriserve.core.cluster import Role
from tetriserve.core.cost import times_per_step
from tetriserve.core.plan import Plan, State, Task
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.batching import may_share
from tetriserve.policies.degrees import fastest_degree
from tetriserve.policies.placement import num_foreign

CHUNK_S = 0.5
"""Length of a task of steps. Short enough that a cancelled request leaves soon and a dead worker costs little."""

Block = tuple[int, ...]


class BlockPolicy(ABC):
    """First come first served over disjoint blocks of ranks, non-preemptive.

    A request holds its block from its first stage to its last, although short stages may run on one rank of it alone.
    Which request holds which block is read from the state: the first of a started trajectory's holders, or the leader
    of its running task, lies in the block. A request whose block lost a rank moves to the next free block, ahead of
    requests that have not started.

    Where only some ranks may run a stage, and not every block has one of them, the stage is afloat (`afloat`): it runs
    on an idle one of them, whichever block that lies in, between the tasks of that block and before them. A request
    holds no block at such a stage. It begins one only if a block will be free for it.

    With a `batch` above 1 up to so many requests of one kind hold a block and share its tasks of steps, as servers with
    dynamic batching do it: where no block is free, requests join between tasks, in order of arrival, without regard
    to deadlines.
    """

    def __init__(self, batch: int = 1) -> None:
        self.batch = batch

    @abstractmethod
    def blocks(self, ranks: tuple[int, ...]) -> tuple[Block, ...]:
        """Disjoint blocks out of the living ranks."""

    @abstractmethod
    def step_ranks(self, block: Block, step_times: Mapping[int, float]) -> Block:
        """The ranks of `block` that steps run on; none when the shape needs more ranks than the block has."""

    def plan(self, state: State, now: float) -> Plan:
        floor = _Floor(state, self.blocks)
        owners = self._owners(state, floor)
        tasks = self._float(state, floor, owners)
        idle = set(state.idle_ranks).difference(rank for task in tasks for rank in task.ranks)
        floor.keep_free(idle, owners.values())
        held: dict[Block, list[Trajectory]] = {}
        for trajectory in sorted(state.waiting, key=lambda trajectory: not trajectory.has_started):
            if trajectory.stage.kind in floor.afloat_of(trajectory):
                continue
            block = owners.get(trajectory.request_id) or best_block(trajectory, floor.free_for(trajectory), state)
            block = block or next((block for block in held if self._has_room(held[block], trajectory)), None)
            # Its own block may be busy for a moment, when a rank has returned and two blocks become one again.
            if block is not None and not idle.issuperset(block):
                continue
            if block is None:
                floor.await_block(trajectory)
            elif self.step_ranks(block, times_per_step(state.cost, trajectory.request)):
                held.setdefault(block, []).append(trajectory)
                floor.take(block)
        tasks += [self._next_task(members, block, state) for block, members in sorted(held.items())]
        return Plan(tuple(tasks))

    def _float(self, state: State, floor: _Floor, owners: Mapping[str, Block]) -> list[Task]:
        """Tasks of stages that are afloat, in order of arrival, but those that have started first."""
        if not state.stage_ranks or not any(floor.afloat_of(trajectory) for trajectory in state.trajectories):
            return []
        places = floor.places(list(owners.values()), self.batch)
        ready: list[Trajectory] = []
        for trajectory in sorted(state.trajectories, key=lambda trajectory: not trajectory.has_started):
            needs_place = trajectory.remaining_steps > 0 and trajectory.request_id not in owners
            step_times = times_per_step(state.cost, trajectory.request)
            blocks = floor.blocks_of(trajectory)
            if needs_place and not any(self.step_ranks(block, step_times) for block in blocks):
                continue
            if trajectory.is_running or trajectory.stage.kind not in floor.afloat_of(trajectory):
                if needs_place and trajectory.has_started:
                    places.take(blocks)
            elif not needs_place or places.are_left(blocks):
                if needs_place:
                    places.take(blocks)
                ready.append(trajectory)
        return float_tasks(ready, state, frozenset(chain.from_iterable(owners.values())))

    def _has_room(self, members: Sequence[Trajectory], newcomer: Trajectory) -> bool:
        return 0 < len(members) < self.batch and may_share([*members, newcomer])

    def _owners(self, state: State, floor: _Floor) -> dict[str, Block]:
        """The block of each started request, by request id, but of those whose block is gone or that are afloat."""
        trajectories = {trajectory.request_id: trajectory for trajectory in state.trajectories}
        running = [trajectories[name] for name in state.flights if name in trajectories]  # not cancelled
        leaders = {
            trajectory.request_id: state.flights[trajectory.request_id].task.ranks[0]
            for trajectory in running
            if trajectory.stage.kind not in floor.afloat_of(trajectory)
        }
        leaders |= {
            trajectory.request_id: trajectory.holders[0]
            for trajectory in state.waiting
            if trajectory.has_started and trajectory.holders and not is_afloat(trajectory, floor.afloat_of(trajectory))
        }
        owners: dict[str, Block] = {}
        for request_id, leader in leaders.items():
            block = next((block for block in floor.blocks_of(trajectories[request_id]) if leader in block), None)
            if block is None:
                continue
            others = [other for other, theirs in owners.items() if not set(theirs).isdisjoint(block)]
            company = [trajectories[name] for name in (*others, request_id)]
            is_shared = all(owners[other] == block for other in others) and len(others) < self.batch
            if not others or (is_shared and may_share(company)):
                owners[request_id] = block
        return owners

    def _next_task(self, members: Sequence[Trajectory], block: Block, state: State) -> Task:
        """Short stages, one at a time, before steps together."""
        first = next((member for member in members if member.is_short), members[0])
        step_times = times_per_step(state.cost, first.request, 1 if first.is_short else len(members))
        ranks = self.step_ranks(block, step_times)
        if first.is_short:
            return Task((first.request_id,), first.stage.kind, self._short_ranks(first, ranks, block, state))
        num_steps = max(1, int(CHUNK_S / step_times[len(ranks)]))
        most = min(member.remaining_steps for member in members)
        names = tuple(member.request_id for member in members)
        return Task(names, first.stage.kind, ranks, min(num_steps, most))

    def _short_ranks(self, trajectory: Trajectory, ranks: Block, block: Block, state: State) -> Block:
        """Where a short stage runs: on as many of those that may run it as `step_ranks` would give to steps."""
        allowed = allowed_in(trajectory, ranks, block, state)
        times = state.cost.times(trajectory.request, trajectory.stage)
        return tuple(sorted(allowed[: len(self.step_ranks(tuple(sorted(allowed)), times))]))


class FixedDegree(BlockPolicy):
    """`fixed:k`: the pool cut into aligned blocks of `degree` ranks, one request per block.

    A shape that cannot run at `degree` uses the widest degree below it, on part of its block. When deaths leave no
    whole block, blocks of half the width take over, and so on: the pool keeps serving.
    """

    def __init__(self, degree: int, batch: int = 1) -> None:
        super().__init__(batch)
        self.degree = degree

    def blocks(self, ranks: tuple[int, ...]) -> tuple[Block, ...]:
        degree = self.degree
        while degree > 1 and not any(True for _ in whole_blocks(ranks, degree)):
            degree //= 2
        return tuple(whole_blocks(ranks, degree))

    def step_ranks(self, block: Block, step_times: Mapping[int, float]) -> Block:
        fitting = [degree for degree in step_times if degree <= len(block)]
        return block[: max(fitting)] if fitting else ()


class FirstComeFirstServed(BlockPolicy):
    """`fcfs`: the whole pool is one block, or each of its nodes is, held by one request at a time, each at its
    fastest degree.

    This is one pipeline behind a lock, with sequence parallelism over the pool: nothing runs beside the request.
    """

    def blocks(self, ranks: tuple[int, ...]) -> tuple[Block, ...]:
        return (ranks,) if ranks else ()

    def step_ranks(self, block: Block, step_times: Mapping[int, float]) -> Block:
        fitting = {degree: step_s for degree, step_s in step_times.items() if degree <= len(block)}
        if not fitting:
            return ()
        degree = fastest_degree(fitting)
        return next(whole_blocks(block, degree), block[:degree])


class _Floor:
    """The blocks of the pool: those that a request may hold depend on which ranks may run its steps."""

    def __init__(self, state: State, blocks: Callable[[Block], tuple[Block, ...]]) -> None:
        self._state = state
        self._blocks: dict[Role | None, tuple[Block, ...]] = {}
        for trajectory in state.trajectories:
            if (role := self._role(trajectory)) not in self._blocks:
                ranks = state.nodes.by_node(ranks_for_steps(trajectory, state))
                self._blocks[role] = tuple(chain.from_iterable(map(blocks, ranks.values())))
        self._afloat: dict[tuple[object, ...], frozenset[str]] = {}
        self._free: dict[Role | None, list[Block]] = {}

    def blocks_of(self, trajectory: Trajectory) -> tuple[Block, ...]:
        """Disjoint blocks of living ranks that may run its steps."""
        return self._blocks[self._role(trajectory)]

    def afloat_of(self, trajectory: Trajectory) -> frozenset[str]:
        """See `afloat`."""
        if not self._state.stage_ranks:
            return frozenset()
        kinds = trajectory.request.model, *(stage.kind for stage in trajectory.request.stages)
        if kinds not in self._afloat:
            self._afloat[kinds] = afloat(trajectory, self.blocks_of(trajectory), self._state)
        return self._afloat[kinds]

    def places(self, held: Collection[Block], batch: int) -> _Places:
        return _Places(self._blocks.values(), held, batch)

    def keep_free(self, idle: Set[int], held: Iterable[Block]) -> None:
        """From now on blocks are free that are idle and that do not overlap with those that are held."""
        self._free = {role: [block for block in blocks if idle >= set(block)] for role, blocks in self._blocks.items()}
        for block in held:
            self.take(block)

    def free_for(self, trajectory: Trajectory) -> list[Block]:
        return self._free[self._role(trajectory)]

    def take(self, block: Block) -> None:
        """It is free no more, nor is any that overlaps with it."""
        for role, blocks in self._free.items():
            self._free[role] = [other for other in blocks if set(other).isdisjoint(block)]

    def await_block(self, trajectory: Trajectory) -> None:
        """No request behind this one takes what it waits for."""
        if len(self._free) > 1:
            for block in self.blocks_of(trajectory):
                self.take(block)

    def _role(self, trajectory: Trajectory) -> Role | None:
        request = trajectory.request
        return self._state.stage_ranks.role(request.model, request.stepped.kind)


class _Places:
    """How many more requests can hold blocks, in each division of the pool, if `batch` share one."""

    def __init__(self, divisions: Iterable[tuple[Block, ...]], held: Collection[Block], batch: int) -> None:
        self._left = dict.fromkeys(divisions, 0)
        for blocks in self._left:
            for block in blocks:
                theirs = [other for other in held if not set(other).isdisjoint(block)]
                if all(other == block for other in theirs):
                    self._left[blocks] += batch - len(theirs)

    def are_left(self, blocks: tuple[Block, ...]) -> bool:
        return self._left[blocks] > 0

    def take(self, blocks: tuple[Block, ...]) -> None:
        """One in this division, and as many in those that overlap with it."""
        ranks = set(chain.from_iterable(blocks))
        for others in self._left:
            if others == blocks or not ranks.isdisjoint(chain.from_iterable(others)):
                self._left[others] -= 1


def ranks_for_steps(trajectory: Trajectory, state: State) -> Block:
    """The living ranks that may run its steps."""
    return state.stage_ranks.among(trajectory.request.model, trajectory.request.stepped.kind, state.ranks)


def afloat(trajectory: Trajectory, blocks: Sequence[Block], state: State) -> frozenset[str]:
    """The kinds of stage that it cannot count on running in its block, one of `blocks`: some has no rank for them."""
    request = trajectory.request
    roles = {stage.kind: state.stage_ranks.role(request.model, stage.kind) for stage in request.stages}
    return frozenset(
        kind for kind, role in roles.items() if role is not None and any(role.isdisjoint(block) for block in blocks)
    )


def is_afloat(trajectory: Trajectory, floating: Set[str]) -> bool:
    """Whether a request holds no block: its present stage is afloat, or it waits after one that was."""
    is_after = not trajectory.is_running and trajectory.last_kind in floating
    return is_after or trajectory.stage.kind in floating


def float_tasks(ready: Sequence[Trajectory], state: State, held: Set[int]) -> list[Task]:
    """Short stages that are afloat, on idle ranks that may run them: the `held` ones last, then those that have the
    request's adapter active first."""
    idle = list(state.idle_ranks)
    tasks = []
    for trajectory in ready:
        ratings = {
            rank: (rank in held, num_foreign(trajectory, (rank,), state.loras), rank)
            for rank in state.stage_ranks.among(trajectory.request.model, trajectory.stage.kind, idle)
        }
        if ratings:
            rank = min(ratings, key=ratings.__getitem__)
            idle.remove(rank)
            tasks.append(Task((trajectory.request_id,), trajectory.stage.kind, (rank,)))
    return tasks


def best_block(trajectory: Trajectory, blocks: Sequence[Block], state: State) -> Block | None:
    """The first without ranks that stages depend on which not every rank may run, and of those on which fewest ranks
    would switch adapters; None if there are no blocks."""
    own = state.stage_ranks.role(trajectory.request.model, trajectory.request.stepped.kind)
    needed = frozenset(chain.from_iterable(role for role in state.stage_ranks.roles if role != own))

    def rating(block: Block) -> tuple[bool, int]:
        return not needed.isdisjoint(block), num_foreign(trajectory, block, state.loras)

    return min(blocks, key=rating, default=None)


def allowed_in(trajectory: Trajectory, ranks: Block, block: Block, state: State) -> Block:
    """The ranks of `block` that may run the stage it is at, those of its `ranks` for steps first."""
    model, kind = trajectory.request.model, trajectory.stage.kind
    others = [rank for rank in block if rank not in ranks]
    return state.stage_ranks.among(model, kind, [*ranks, *others])


def whole_blocks(ranks: tuple[int, ...], degree: int) -> Iterator[Block]:
    """Aligned blocks of `degree` neighbouring ranks, all of them living."""
    living = set(ranks)
    for start in sorted({rank - rank % degree for rank in ranks}):
        block = tuple(range(start, start + degree))
        if living.issuperset(block):
            yield block
