"""Resolution-specific sequence parallelism: one degree per shape, chosen from the profile."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

from tetriserve.core.cost import times_per_step
from tetriserve.core.plan import Plan, State, Task
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.fixed import (
    CHUNK_S,
    Block,
    afloat,
    allowed_in,
    best_block,
    float_tasks,
    is_afloat,
    ranks_for_steps,
    whole_blocks,
)

MIN_EFFICIENCY = 0.7
"""GPU time at the cheapest degree over GPU time at the chosen one. On FLUX.1-dev and 8 H100 it gives the degrees of
TetriServe, section 6.1: 1 for 256 and 512, 2 for 1024, 8 for 2048."""


def efficient_enough_degree(step_times: Mapping[int, float], min_efficiency: float = MIN_EFFICIENCY) -> int:
    """The fastest degree whose efficiency is at least `min_efficiency`; the narrower one of equals."""
    cheapest = min(degree * step_s for degree, step_s in step_times.items())
    allowed = {k: step_s for k, step_s in step_times.items() if cheapest >= min_efficiency * k * step_s}
    return min(allowed, key=lambda degree: (allowed[degree], degree))


class ResolutionSpecific:
    """`rssp`: first come first served, non-preemptive, each request on an aligned block as wide as its shape's degree.

    A request holds its block from its first stage to its last, although short stages may run on one rank of it alone.
    The request at the head waits until its block is free, and those behind it take no rank that it could use; with
    `backfill` they do, and may keep a wide group from forming. A request whose block lost a rank moves, ahead of those
    that have not started; degrees wider than the largest living block are left out. A stage that not every rank may run
    may be afloat, as in `BlockPolicy`.
    """

    def __init__(self, *, backfill: bool = False) -> None:
        self.backfill = backfill

    def plan(self, state: State, now: float) -> Plan:
        held: dict[str, Block] = {}
        floats: list[Trajectory] = []
        moving: list[Trajectory] = []
        new: list[Trajectory] = []
        taken = {rank for flight in state.in_flight for rank in flight.task.ranks}
        leaders = {request_id: flight.task.ranks[0] for request_id, flight in state.flights.items()}
        # In order of arrival; should two claim a rank after a death, the later one moves.
        for trajectory in state.trajectories:
            if not trajectory.has_started:
                new.append(trajectory)
                continue
            leader = leaders.get(trajectory.request_id, next(iter(trajectory.holders), None))
            degree = self._degree(trajectory, state)
            blocks = self._blocks(trajectory, degree, state)
            floating = afloat(trajectory, blocks, state)
            if is_afloat(trajectory, floating):
                if trajectory.remaining_steps:
                    moving.append(trajectory)  # it holds no block: it has the next
                    continue
                if trajectory.stage.kind in floating:
                    if not trajectory.is_running:
                        floats.append(trajectory)
                    continue
            block = next((block for block in blocks if leader in block), None)
            if trajectory.is_running:
                taken.update(block or ())
            elif block is None or taken.intersection(block):
                moving.append(trajectory)
            else:
                held[trajectory.request_id] = block
                taken.update(block)
        for trajectory in moving + new:
            degree = self._degree(trajectory, state)
            blocks = self._blocks(trajectory, degree, state)
            block = best_block(trajectory, [each for each in blocks if not taken.intersection(each)], state)
            if block is not None:
                if trajectory.stage.kind in afloat(trajectory, blocks, state):
                    floats += [trajectory] if not trajectory.is_running else []
                else:
                    held[trajectory.request_id] = block
                taken.update(block)
            elif degree and not self.backfill:
                taken.update(ranks_for_steps(trajectory, state))
                if taken.issuperset(state.ranks):
                    break
        tasks = float_tasks(floats, state, frozenset(chain.from_iterable(held.values()))) if floats else []
        used = {rank for task in tasks for rank in task.ranks}
        tasks += [
            _next_task(trajectory, held[trajectory.request_id], state)
            for trajectory in state.waiting
            if trajectory.request_id in held and used.isdisjoint(held[trajectory.request_id])
        ]
        return Plan(tuple(tasks))

    def _degree(self, trajectory: Trajectory, state: State) -> int:
        """The degree of the shape among those for which a whole block lives; 0 for none."""
        by_node = state.nodes.by_node(ranks_for_steps(trajectory, state)).values()
        step_times = {
            degree: step_s
            for degree, step_s in times_per_step(state.cost, trajectory.request).items()
            if any(any(True for _ in whole_blocks(of_node, degree)) for of_node in by_node)
        }
        return efficient_enough_degree(step_times) if step_times else 0

    @staticmethod
    def _blocks(trajectory: Trajectory, degree: int, state: State) -> list[Block]:
        by_node = state.nodes.by_node(ranks_for_steps(trajectory, state)).values() if degree else ()
        return [block for ranks in by_node for block in whole_blocks(ranks, degree)]


def _next_task(trajectory: Trajectory, block: Block, state: State) -> Task:
    if trajectory.is_short:
        allowed = allowed_in(trajectory, block, block, state)
        times = state.cost.times(trajectory.request, trajectory.stage)
        degree = efficient_enough_degree({k: seconds for k, seconds in times.items() if k <= len(allowed)})
        return Task((trajectory.request_id,), trajectory.stage.kind, allowed[:degree])
    step_s = times_per_step(state.cost, trajectory.request)[len(block)]
    num_steps = min(trajectory.remaining_steps, max(1, int(CHUNK_S / step_s)))
    return Task((trajectory.request_id,), trajectory.stage.kind, block, num_steps)
