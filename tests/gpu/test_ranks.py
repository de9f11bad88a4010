"""Four ranks on one GPU: the image is the same whatever ranks a request runs on, also when one dies or starves."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.gloo.test_executor import (
    NUM_RANKS,
    REQUESTS,
    Driver,
    Result,
    assert_same,
    begun,
    make_request,
    random_plan,
)
from tests.waiting import HANG_S, until
from tetriserve.config import PoolConfig
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, image_stages
from tetriserve.executor.local import LocalExecutor
from tetriserve.models.card import ModelCard
from tetriserve.models.flux.adapter import FluxAdapter

ALL_RANKS = tuple(range(NUM_RANKS))
HEARTBEAT_TIMEOUT_S = 10.0
MANY_STEPS = 900
"""More than are done until the rank is killed, on any device."""


def four_ranks(device: str) -> PoolConfig:
    """All on one GPU, or on the CPU."""
    if device == "cpu":
        return PoolConfig(num_ranks=NUM_RANKS, heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S)
    return PoolConfig(
        num_ranks=NUM_RANKS, device=device, ranks_per_gpu=NUM_RANKS, heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S
    )


@asynccontextmanager
async def driving(card: ModelCard, device: str, adapter: str | None = None) -> AsyncIterator[Driver]:
    executor = LocalExecutor([card], four_ranks(device), adapter=adapter)
    await executor.start(lambda text: None)
    try:
        yield Driver(executor)
    finally:
        await executor.stop()


@pytest.fixture(scope="module")
async def driver(card: ModelCard, device: str) -> AsyncIterator[Driver]:
    async with driving(card, device) as driver:
        yield driver


def alone(reference: FluxAdapter, request: Request) -> Result:
    """At degree 1, in this process and on the same device."""
    loop = reference.denoise_loop(request, reference.encode(request), 0)
    latents = reference.initial_latents(request)
    for _ in range(request.num_steps):
        latents = loop.step(latents)
    return Result(latents.cpu(), reference.decode(request, latents))


@pytest.mark.parametrize("seed", range(3))
async def test_random_schedules_give_the_images_of_degree_1(driver: Driver, reference: FluxAdapter, seed: int) -> None:
    rng = random.Random(seed)
    chosen = rng.choices(REQUESTS, k=3)
    results = await asyncio.gather(
        *(
            driver.carry(
                request,
                random_plan(rng, request.num_steps),
                encode_rank=rng.randrange(NUM_RANKS),
                decode_rank=rng.randrange(NUM_RANKS),
            )
            for request in chosen
        )
    )
    for request, result in zip(chosen, results, strict=True):
        assert_same(result, alone(reference, request))


async def test_degree_1_through_workers_is_bit_identical_to_the_model_alone(
    driver: Driver, reference: FluxAdapter
) -> None:
    result = await driver.carry(REQUESTS[3], [((2,), 2), ((0,), 1)], encode_rank=1, decode_rank=3)
    expected = alone(reference, REQUESTS[3])
    assert result.latents.equal(expected.latents)
    assert (result.pixels == expected.pixels).all()


async def test_a_rank_killed_in_the_middle_of_a_task_is_replaced_and_the_request_goes_on_from_its_copy(
    driver: Driver, reference: FluxAdapter
) -> None:
    executor = driver.executor
    request = make_request("a red circle", 6, Shape(128, 128))
    request = dataclasses.replace(request, request_id="killed")
    endless = dataclasses.replace(request, request_id="endless", stages=image_stages(MANY_STEPS))
    (work,) = await driver.advance(Task(("killed",), ENCODE, (0,)), begun(request))
    (work,) = await driver.advance(Task(("killed",), DENOISE, ALL_RANKS, 2), work)
    (doomed,) = await driver.advance(Task(("endless",), ENCODE, (0,)), begun(endless))
    before, pid = executor._workers[1].num_steps, executor.pids[1]
    lost = asyncio.create_task(driver.run(Task(("endless",), DENOISE, ALL_RANKS, MANY_STEPS), doomed))
    await until(lambda: executor._workers[1].num_steps > before)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="rank 1 was lost"):
        await lost
    (work,) = await driver.advance(Task(("killed",), DENOISE, (0, 2), 2), work)
    await until(lambda: executor.ranks == set(ALL_RANKS))
    assert executor.pids[1] != pid
    (work,) = await driver.advance(Task(("killed",), DENOISE, ALL_RANKS, 2), work)
    (work,) = await driver.advance(Task(("killed",), DECODE, (1,)), work)
    assert_same(driver.take(work), alone(reference, request))
    executor.forget("endless")


async def test_a_rank_that_runs_out_of_memory_costs_its_task_and_no_more(
    card: ModelCard, device: str, reference: FluxAdapter, tmp_path: Path
) -> None:
    async with driving(card, device, "starving_flux:StarvingFlux") as driver:
        prompt = f"a red circle [starve {tmp_path / 'starved'}]"
        request = dataclasses.replace(make_request(prompt, 4, Shape(128, 128)), request_id="starved")
        (work,) = await driver.advance(Task(("starved",), ENCODE, (0,)), begun(request))
        task = Task(("starved",), DENOISE, (0, 2), 2)
        with pytest.raises(RuntimeError, match=r"allocate memory|out of memory"):
            await asyncio.wait_for(driver.run(task, work), HANG_S)
        await until(lambda: driver.executor.ranks == set(ALL_RANKS))
        for _ in range(2):
            (work,) = await driver.advance(task, work)
        (work,) = await driver.advance(Task(("starved",), DECODE, (0,)), work)
        assert_same(driver.take(work), alone(reference, request))
        assert driver.executor.num_restarts == 1
