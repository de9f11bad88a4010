"""Baselines in the way of xDiT: requests in order of arrival, each alone on its block of ranks until it is done."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import chain

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

    A request holds its block from its first stage to its last, although short stages run on one rank of it alone. Which
    request holds which block is read from the state: the first of a started trajectory's holders, or the leader of its
    running task, lies in the block. A request whose block lost a rank moves to the next free block, ahead of requests
    that have not started.

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
        blocks = self.blocks(ranks_for_steps(state))
        floating = afloat(state, blocks)
        owners = self._owners(state, blocks, floating)
        idle = set(state.idle_ranks)
        tasks = self._float(state, blocks, owners, floating) if floating else []
        idle.difference_update(rank for task in tasks for rank in task.ranks)
        held: dict[Block, list[Trajectory]] = {block: [] for block in blocks if idle.issuperset(block)}
        free = [block for block in held if block not in owners.values()]
        for trajectory in sorted(state.waiting, key=lambda trajectory: not trajectory.has_started):
            if trajectory.stage.kind in floating:
                continue
            block = owners.get(trajectory.request_id) or best_block(trajectory, free, state)
            block = block or next((block for block in held if self._has_room(held[block], trajectory)), None)
            # Its own block may be busy for a moment, when a rank has returned and two blocks become one again.
            if block is None or block not in held:
                continue
            if self.step_ranks(block, times_per_step(state.cost, trajectory.request)):
                held[block].append(trajectory)
                free = [other for other in free if other != block]
        tasks += [self._next_task(members, block, state) for block, members in held.items() if members]
        return Plan(tuple(tasks))

    def _float(
        self, state: State, blocks: Sequence[Block], owners: Mapping[str, Block], floating: Set[str]
    ) -> list[Task]:
        """Tasks of stages that are afloat, in order of arrival, but those that have started first."""
        num_places = self.batch * len(blocks) - len(owners)
        ready: list[Trajectory] = []
        for trajectory in sorted(state.trajectories, key=lambda trajectory: not trajectory.has_started):
            needs_place = trajectory.remaining_steps > 0 and trajectory.request_id not in owners
            step_times = times_per_step(state.cost, trajectory.request)
            if needs_place and not any(self.step_ranks(block, step_times) for block in blocks):
                continue
            if trajectory.is_running or trajectory.stage.kind not in floating:
                num_places -= needs_place and trajectory.has_started
            elif num_places > 0 or not needs_place:
                num_places -= needs_place
                ready.append(trajectory)
        return float_tasks(ready, state, frozenset(chain.from_iterable(owners.values())))

    def _has_room(self, members: Sequence[Trajectory], newcomer: Trajectory) -> bool:
        return 0 < len(members) < self.batch and may_share([*members, newcomer])

    def _owners(self, state: State, blocks: tuple[Block, ...], floating: Set[str]) -> dict[str, Block]:
        """The block of each started request, by request id, but of those whose block is gone or that are afloat."""
        trajectories = {trajectory.request_id: trajectory for trajectory in state.trajectories}
        leaders = {
            request_id: flight.task.ranks[0]
            for request_id, flight in state.flights.items()
            if flight.task.stage not in floating
        }
        leaders |= {
            trajectory.request_id: trajectory.holders[0]
            for trajectory in state.waiting
            if trajectory.has_started and trajectory.holders and not is_afloat(trajectory, floating)
        }
        owners: dict[str, Block] = {}
        for request_id, leader in leaders.items():
            block = next((block for block in blocks if leader in block), None)
            if block is None:
                continue
            others = [other for other, theirs in owners.items() if theirs == block]
            company = [trajectories[name] for name in (*others, request_id) if name in trajectories]  # not cancelled
            if not others or (len(others) < self.batch and may_share(company)):
                owners[request_id] = block
        return owners

    def _next_task(self, members: Sequence[Trajectory], block: Block, state: State) -> Task:
        """Short stages, one at a time, before steps together."""
        first = next((member for member in members if member.is_short), members[0])
        step_times = times_per_step(state.cost, first.request, 1 if first.is_short else len(members))
        ranks = self.step_ranks(block, step_times)
        if first.is_short:
            return Task((first.request_id,), first.stage.kind, leader_of(first, ranks, block, state))
        num_steps = max(1, int(CHUNK_S / step_times[len(ranks)]))
        most = min(member.remaining_steps for member in members)
        names = tuple(member.request_id for member in members)
        return Task(names, first.stage.kind, ranks, min(num_steps, most))


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
    """`fcfs`: the whole pool is one block, held by one request at a time, each at its fastest degree.

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


def ranks_for_steps(state: State) -> Block:
    """The living ranks that may run the steps of all unfinished requests."""
    ranks = state.ranks
    if state.stage_ranks:
        for kind in {trajectory.request.stepped.kind for trajectory in state.trajectories}:
            ranks = state.stage_ranks.among(kind, ranks)
    return ranks


def afloat(state: State, blocks: Sequence[Block]) -> frozenset[str]:
    """The kinds of stage that a request cannot count on running in its block: some block has no rank for them."""
    limits = state.stage_ranks.by_kind
    return frozenset(kind for kind, ranks in limits.items() if not all(ranks.intersection(block) for block in blocks))


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
            for rank in state.stage_ranks.among(trajectory.stage.kind, idle)
        }
        if ratings:
            rank = min(ratings, key=ratings.__getitem__)
            idle.remove(rank)
            tasks.append(Task((trajectory.request_id,), trajectory.stage.kind, (rank,)))
    return tasks


def best_block(trajectory: Trajectory, blocks: Sequence[Block], state: State) -> Block | None:
    """The first without ranks that stages depend on which not every rank may run, and of those on which fewest ranks
    would switch adapters; None if there are no blocks."""
    needed = frozenset(chain.from_iterable(state.stage_ranks.by_kind.values()))

    def rating(block: Block) -> tuple[bool, int]:
        return not needed.isdisjoint(block), num_foreign(trajectory, block, state.loras)

    return min(blocks, key=rating, default=None)


def leader_of(trajectory: Trajectory, ranks: Block, block: Block, state: State) -> Block:
    """The rank of `block`, of its `ranks` for steps if it can be, that a short stage runs on."""
    stage_ranks, kind = state.stage_ranks, trajectory.stage.kind
    return (stage_ranks.among(kind, ranks) or stage_ranks.among(kind, block))[:1]


def whole_blocks(ranks: tuple[int, ...], degree: int) -> Iterator[Block]:
    """Aligned blocks of `degree` neighbouring ranks, all of them living."""
    living = set(ranks)
    for start in sorted({rank - rank % degree for rank in ranks}):
        block = tuple(range(start, start + degree))
        if living.issuperset(block):
            yield block
