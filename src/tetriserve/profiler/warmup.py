"""Runs once what serving will run: the first run of a shape loads kernels and may compile, for seconds to minutes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tetriserve.config import PoolConfig
from tetriserve.core.cluster import aligned_groups
from tetriserve.core.execution import DEFAULT
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE
from tetriserve.executor.protocol import Executor
from tetriserve.models.card import ModelCard
from tetriserve.policies.batching import sizes_that_pay
from tetriserve.profile.cost import ProfileCost
from tetriserve.profiler.bench import Bench
from tetriserve.profiler.measure import OnProgress


async def warm_up(
    executor: Executor,
    card: ModelCard,
    pool: PoolConfig,
    cost: ProfileCost,
    shapes: Sequence[Shape],
    on_progress: OnProgress,
) -> None:
    """One step of each shape at each degree, on all its aligned groups of `pool`, the model's part, at once, and its
    decode at each degree that it has.

    Where the model is compiled, also one of each batch that pays by `cost`: it has a graph of its own.

    Raises:
        TetriServeError: a worker failed or was lost; the message names what was warmed.
    """
    bench = Bench.of(executor, "warming", card, pool)
    todo = [
        (shape, degree, batch)
        for shape in shapes
        for degree in cost.profiled_step_times(shape)
        for batch in _batches(bench, card, cost, shape)
    ]
    for done, (shape, degree, batch) in enumerate(todo):
        what = f"{shape} at degree {degree}" + (f" in a batch of {batch}" if batch > 1 else "")
        on_progress(done, len(todo), what)
        bench.purpose = f"warming {what}"
        groups = aligned_groups(pool.num_ranks, degree)
        await asyncio.gather(*(_run(bench, card, cost, shape, group, batch) for group in groups))
    on_progress(len(todo), len(todo), "done")


async def _run(
    bench: Bench, card: ModelCard, cost: ProfileCost, shape: Shape, group: tuple[int, ...], batch: int
) -> None:
    """A step of a batch on a group; a request alone is decoded there, if it can be."""
    requests = [bench.request(card, shape, 1) for _ in range(batch)]
    for request in requests:
        await bench.encode(request, group[0])
    await bench.denoise(requests, group, 1)
    if batch == 1 and len(group) in cost.times(requests[0], requests[0].stage_of(DECODE)):
        await bench.decode(requests[0], group)
    bench.forget(requests)


def _batches(bench: Bench, card: ModelCard, cost: ProfileCost, shape: Shape) -> list[int]:
    if card.execution.compile == DEFAULT:
        return [1]
    request = bench.request(card, shape, 1)
    return [batch for batch, _ in sizes_that_pay(cost, request, min(cost.profiled_step_times(shape)))]
