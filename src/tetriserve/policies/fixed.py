"""Baselines in the way of xDiT: requests in order of arrival, each alone on its block of ranks until it is done."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from tetriserve.core.cost import times_per_step
from tetriserve.core.plan import CostModel, Plan, State, Task
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.batching import may_share
from tetriserve.policies.degrees import fastest_degree

CHUNK_S = 0.5
"""Length of a task of steps. Short enough that a cancelled request leaves soon and a dead worker costs little."""

Block = tuple[int, ...]


class BlockPolicy(ABC):
    """First come first served over disjoint blocks of ranks, non-preemptive.

    A request holds its block from its first stage to its last, although short stages run on the block's first rank
    alone. Which request holds which block is read from the state: the first of a started trajectory's holders, or the
    leader of its running task, lies in the block. A request whose block lost a rank moves to the next free block, ahead
    of requests that have not started.

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
        blocks = self.blocks(state.ranks)
        owners = self._owners(state, blocks)
        idle = set(state.idle_ranks)
        held: dict[Block, list[Trajectory]] = {block: [] for block in blocks if idle.issuperset(block)}
        free = [block for block in held if block not in owners.values()]
        for trajectory in sorted(state.waiting, key=lambda trajectory: not trajectory.has_started):
            block = owners.get(trajectory.request_id) or next(iter(free), None)
            block = block or next((block for block in held if self._has_room(held[block], trajectory)), None)
            # Its own block may be busy for a moment, when a rank has returned and two blocks become one again.
            if block is None or block not in held:
                continue
            if self.step_ranks(block, times_per_step(state.cost, trajectory.request)):
                held[block].append(trajectory)
                free = [other for other in free if other != block]
        return Plan(tuple(self._next_task(members, block, state.cost) for block, members in held.items() if members))

    def _has_room(self, members: Sequence[Trajectory], newcomer: Trajectory) -> bool:
        return 0 < len(members) < self.batch and may_share([*members, newcomer])

    def _owners(self, state: State, blocks: tuple[Block, ...]) -> dict[str, Block]:
        """The block of each started request, by request id; those whose block is gone are left out."""
        trajectories = {trajectory.request_id: trajectory for trajectory in state.trajectories}
        leaders = {request_id: flight.task.ranks[0] for request_id, flight in state.flights.items()}
        leaders |= {
            trajectory.request_id: trajectory.holders[0]
            for trajectory in state.waiting
            if trajectory.has_started and trajectory.holders
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

    def _next_task(self, members: Sequence[Trajectory], block: Block, cost: CostModel) -> Task:
        """Short stages, one at a time, before steps together."""
        first = next((member for member in members if member.is_short), members[0])
        step_times = times_per_step(cost, first.request, 1 if first.is_short else len(members))
        ranks = self.step_ranks(block, step_times)
        if first.is_short:
            return Task((first.request_id,), first.stage.kind, ranks[:1])
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


def whole_blocks(ranks: tuple[int, ...], degree: int) -> Iterator[Block]:
    """Aligned blocks of `degree` neighbouring ranks, all of them living."""
    living = set(ranks)
    for start in sorted({rank - rank % degree for rank in ranks}):
        block = tuple(range(start, start + degree))
        if living.issuperset(block):
            yield block
