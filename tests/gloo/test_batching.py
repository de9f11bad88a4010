"""Requests that share tasks on real workers: each gets its own picture, whatever happens to the others."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest

from tests.waiting import until
from tetriserve.config import PoolConfig
from tetriserve.control import Controller
from tetriserve.control.foresight import Foresight
from tetriserve.core.errors import RequestFailed
from tetriserve.core.plan import Plan, State, Task
from tetriserve.core.request import Request
from tetriserve.core.trajectory import Trajectory
from tetriserve.engine import GeneratedImage, Generation, LiveEngine
from tetriserve.engine.intake import Intake
from tetriserve.executor.local import LocalExecutor
from tetriserve.models.card import ModelCard
from tetriserve.policies.policy import Policy
from tetriserve.policies.registry import make_policy
from tetriserve.profile import Profile, ProfileCost

PIXEL_TOLERANCE = 1
HEARTBEAT_TIMEOUT_S = 8.0
SIZES = ("64x64", "128x64", "96x96")
COLOURS = ("red", "blue", "green", "yellow", "white", "black")


@pytest.fixture(scope="module")
def batched(profile: Profile) -> Profile:
    """Batches up to 8 pay at every size, small ones included."""
    small = [
        dataclasses.replace(row, height=32, width=32, tokens=row.tokens and 1)
        for row in profile.rows
        if row.height == 256
    ]
    more = [
        dataclasses.replace(row, batch=batch, seconds=row.seconds * (0.5 + 0.5 * batch))
        for row in (*small, *profile.rows)
        if row.tokens
        for batch in (2, 4, 8)
    ]
    return dataclasses.replace(profile, rows=(*profile.rows, *small, *more))


@asynccontextmanager
async def serving(card: ModelCard, profile: Profile, num_ranks: int, policy: Policy | str) -> AsyncIterator[LiveEngine]:
    """An engine whose workers fail to order."""
    pool = PoolConfig(num_ranks=num_ranks, heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S)
    executor = LocalExecutor([card], pool, adapter="faulty_flux:FaultyFlux")
    await executor.start(lambda text: None)
    cost = ProfileCost(profile, lambda shape: card.valid_degrees(pool.degrees))

    def new_policy() -> Policy:
        if not isinstance(policy, str):
            return policy
        return make_policy(policy, cost, num_ranks=num_ranks, shapes=profile.shapes)

    engine = LiveEngine(
        Controller(new_policy(), cost), executor, [Intake(card=card, cost=cost)], Foresight(new_policy),
        max_queue=256, policy_name="test",
    )  # fmt: skip
    engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def generations(count: int, seed: int) -> list[Generation]:
    dice = random.Random(seed)
    guidances = ((None, None), (None, None), ("blurry", 3.0), ("dark", 2.0))
    pairs = [dice.choice(guidances) for _ in range(count)]
    return [
        Generation(
            prompt=f"a {dice.choice(COLOURS)} circle {number}",
            size=dice.choice(SIZES),
            num_steps=dice.randint(1, 6),
            seed=number,
            guidance_scale=dice.uniform(1.0, 5.0),
            slo_s=dice.choice((0.01, 2.0, 60.0)),
            negative_prompt=negative_prompt,
            true_cfg_scale=true_cfg_scale,
        )
        for number, (negative_prompt, true_cfg_scale) in enumerate(pairs)
    ]


async def assert_right(images: Sequence[GeneratedImage], paint: Callable[[Request], np.ndarray]) -> None:
    for image in images:
        alone = await asyncio.to_thread(paint, image.outcome.request)
        assert np.abs(image.pixels.astype(int) - alone).max() <= PIXEL_TOLERANCE


def largest_batch(images: Sequence[GeneratedImage]) -> int:
    return max(run.task.batch for image in images for run in image.outcome.runs)


@pytest.mark.parametrize("policy", ["lookahead", "tetriserve", "fixed:1:batch=8"])
async def test_of_64_mixed_requests_at_once_each_gets_its_own_picture(
    policy: str, bundled_card: ModelCard, batched: Profile, paint: Callable[[Request], np.ndarray]
) -> None:
    async with serving(bundled_card, batched, 2, policy) as engine:
        wanted = generations(64, seed=1)
        images = await asyncio.gather(*(engine.generate(generation) for generation in wanted))
        assert [image.outcome.request.prompt for image in images] == [generation.prompt for generation in wanted]
        assert largest_batch(images) > 2
        await assert_right(images, paint)


class Mingling:
    """Random company, degrees, ranks and lengths of tasks."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)

    def plan(self, state: State, now: float) -> Plan:
        idle = [*state.idle_ranks]
        waiting = [*state.waiting]
        self._dice.shuffle(waiting)
        tasks: list[Task] = []
        while idle and waiting:
            first = waiting.pop()
            if first.is_short:
                tasks.append(Task((first.request_id,), first.stage.kind, (idle.pop(),)))
                continue
            degrees = [degree for degree in state.cost.times(first.request, first.stage) if degree <= len(idle)]
            ranks = tuple(sorted(idle.pop() for _ in range(self._dice.choice(degrees))))
            members = [first, *self._company(first, waiting)]
            waiting = [each for each in waiting if each not in members]
            most = min(member.remaining_steps for member in members)
            names = tuple(member.request_id for member in members)
            tasks.append(Task(names, first.stage.kind, ranks, self._dice.randint(1, most)))
        return Plan(tuple(tasks))

    def _company(self, first: Trajectory, waiting: Sequence[Trajectory]) -> list[Trajectory]:
        others = [
            each
            for each in waiting
            if each.request.kind == first.request.kind and not (each.is_short or each.is_apart or first.is_apart)
        ]
        return others[: self._dice.randint(0, 3)]


async def test_random_company_degrees_and_killed_workers_change_no_picture(
    bundled_card: ModelCard, batched: Profile, paint: Callable[[Request], np.ndarray]
) -> None:
    dice = random.Random(5)
    async with serving(bundled_card, batched, 2, Mingling(5)) as engine:
        executor = engine._executor
        assert isinstance(executor, LocalExecutor)
        wanted = [dataclasses.replace(each, num_steps=6) for each in generations(30, seed=2)]
        clients = [asyncio.create_task(engine.generate(generation)) for generation in wanted]
        for _ in range(3):
            await until(lambda: any(flight.task.batch > 1 for flight in engine.state.in_flight))
            busy = {rank for flight in engine.state.in_flight if flight.task.batch > 1 for rank in flight.task.ranks}
            os.kill(executor.pids[dice.choice(sorted(busy))], signal.SIGKILL)
            await until(lambda: len(engine.state.ranks) == 2 and executor.num_restarts > 0)
        images = await asyncio.gather(*clients)
        assert largest_batch(images) > 1
        await assert_right(images, paint)


@pytest.mark.parametrize("mark", ["[nan]", "[runtime]"])
async def test_a_poison_member_fails_alone_and_the_others_get_their_pictures(
    mark: str, bundled_card: ModelCard, batched: Profile, paint: Callable[[Request], np.ndarray]
) -> None:
    async with serving(bundled_card, batched, 1, "fcfs:batch=8") as engine:
        prompts = ["a red circle", f"{mark} poison", "a blue circle", "a green circle"]
        found = await asyncio.gather(
            *(engine.generate(Generation(prompt=each, size="64x64", num_steps=3, seed=7)) for each in prompts),
            return_exceptions=True,
        )
        assert isinstance(found[1], RequestFailed)
        images = [image for image in found if isinstance(image, GeneratedImage)]
        assert [image.outcome.request.prompt for image in images] == [prompts[0], prompts[2], prompts[3]]
        await assert_right(images, paint)
