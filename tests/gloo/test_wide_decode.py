"""An engine whose policy has ranks share decodes: the same picture, also where a worker is lost. And its profile."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.waiting import HANG_S, until
from tetriserve.config import COLLECTIVES, PoolConfig
from tetriserve.control import Controller
from tetriserve.control.foresight import Foresight
from tetriserve.core.execution import Execution
from tetriserve.core.plan import Plan, State, Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.engine import Generation, Intake, LiveEngine, VideoWish
from tetriserve.examples import small_wan
from tetriserve.executor.local import LocalExecutor
from tetriserve.models.adapter import Member
from tetriserve.models.card import ModelCard
from tetriserve.models.checkpoint import read_card
from tetriserve.models.flux.adapter import FluxAdapter
from tetriserve.models.registry import family_of, load_adapter
from tetriserve.models.video_file import VideoFile
from tetriserve.profile import Profile, ProfileCost, Row
from tetriserve.profiler import measure
from tetriserve.workload.outcome import Outcome

ONE_TILE, SMALL, LARGE = Shape(256, 256), Shape(512, 512), Shape(512, 768)
VIDEO = Shape(272, 256, 5)
NUM_RANKS = 4
DEGREES = (1, 2, 3, 4)
"""Of decodes; the model's heads allow steps at 1, 2 and 4."""


class DecodesWide:
    """One task at a time: stages on the first idle rank, but for decodes, on the most that their times allow."""

    def plan(self, state: State, now: float) -> Plan:
        if state.in_flight or not state.waiting or not state.idle_ranks:
            return Plan()
        trajectory = state.waiting[0]
        request, stage = trajectory.request, trajectory.stage
        ranks = tuple(sorted(state.idle_ranks, reverse=True))
        most = len(ranks) if stage.kind == DECODE else 1
        degree = max(degree for degree in state.cost.times(request, stage) if degree <= most)
        return Plan((Task((request.request_id,), stage.kind, ranks[:degree], stage.num_steps),))


@pytest.fixture(scope="module")
def card(bundled_card: ModelCard) -> ModelCard:
    return dataclasses.replace(bundled_card, execution=Execution("float32", tiling="vae"))


@pytest.fixture(scope="module")
def wide_profile(profile: Profile, card: ModelCard) -> Profile:
    """Decodes of the large size are the quicker, the more ranks share them."""
    decodes = [
        Row(stage=DECODE, height=shape.height, width=shape.width, degree=degree, seconds=1.0 / degree)
        for shape in (SMALL, LARGE)
        for degree in DEGREES[1:]
    ]
    larger = [
        dataclasses.replace(row, height=LARGE.height, width=LARGE.width, tokens=row.tokens and 384)
        for row in profile.rows
        if row.shape == SMALL
    ]
    return dataclasses.replace(profile, execution=card.execution, rows=(*profile.rows, *larger, *decodes))


@asynccontextmanager
async def wide_engine(
    card: ModelCard,
    profile: Profile,
    num_ranks: int,
    collectives: str = "shm",
    adapter: str | None = "faulty_flux:FaultyFlux",
) -> AsyncIterator[tuple[LiveEngine, LocalExecutor]]:
    pool = PoolConfig(num_ranks=num_ranks, degrees=DEGREES[:num_ranks], collectives=collectives)
    executor = LocalExecutor([card], pool, adapter=adapter)
    await executor.start(lambda text: None)
    cost = ProfileCost(
        profile,
        lambda shape: card.valid_degrees(pool.degrees),
        short_degrees_of=lambda kind, shape: card.short_degrees(kind, shape, pool.degrees),
    )
    engine = LiveEngine(
        Controller(DecodesWide(), cost), executor, [Intake(card=card, cost=cost)], Foresight(DecodesWide),
        max_queue=16, policy_name="test",
    )  # fmt: skip
    engine.start()
    try:
        yield engine, executor
    finally:
        await engine.stop()


@pytest.fixture(scope="module")
def alone(card: ModelCard) -> Callable[[Request], np.ndarray]:
    """The picture at degree 1, in this process."""
    torch.set_num_threads(1)
    adapter = FluxAdapter(card, "cpu")

    def picture(request: Request) -> np.ndarray:
        loop = adapter.denoise_loop(request, adapter.encode(request), 0)
        latents = adapter.initial_latents(request)
        for _ in range(request.num_steps):
            latents = loop.step(latents)
        pixels = adapter.decode(request, latents)
        assert pixels is not None
        return pixels

    return picture


def decode_degrees(outcome: Outcome) -> list[int]:
    return [run.task.degree for run in outcome.runs if run.task.stage == DECODE]


@pytest.mark.parametrize(("num_ranks", "collectives"), [(2, "shm"), (3, "shm"), (4, "shm"), (2, "torch")])
async def test_a_picture_decoded_by_several_ranks_has_the_bytes_of_degree_1(
    card: ModelCard, wide_profile: Profile, alone: Callable[[Request], np.ndarray], num_ranks: int, collectives: str
) -> None:
    assert collectives in COLLECTIVES
    async with wide_engine(card, wide_profile, num_ranks, collectives) as (engine, executor):
        for shape, degree in ((LARGE, num_ranks), (ONE_TILE, 1)):
            image = await engine.generate(Generation(prompt="a red circle", size=str(shape), seed=5, num_steps=2))
            assert decode_degrees(image.outcome) == [degree]
            assert np.array_equal(image.pixels, alone(image.outcome.request))
        assert executor.num_restarts == 0


@pytest.mark.parametrize("member", [0, 1])
async def test_a_decode_that_loses_a_member_is_made_again(
    card: ModelCard, wide_profile: Profile, alone: Callable[[Request], np.ndarray], member: int
) -> None:
    async with wide_engine(card, wide_profile, 2) as (engine, executor):
        asked = Generation(prompt="[slow] a blue square", size=str(LARGE), seed=6, num_steps=1)
        client = asyncio.create_task(engine.generate(asked))

        def decodes() -> list[Task]:
            return [flight.task for flight in engine.state.in_flight if flight.task.stage == DECODE]

        await until(decodes)
        [struck] = decodes()
        assert struck.degree == 2
        os.kill(executor.pids[struck.ranks[member]], signal.SIGKILL)
        image = await asyncio.wait_for(client, HANG_S)
        assert np.array_equal(image.pixels, alone(image.outcome.request))
        assert [run.task.stage for run in image.outcome.runs] == [ENCODE, DENOISE, DECODE]
        await until(lambda: len(executor.ranks) == 2)
        again = await engine.generate(Generation(prompt="after it", size=str(LARGE), seed=7, num_steps=1))
        assert decode_degrees(again.outcome) == [2]
        assert np.array_equal(again.pixels, alone(again.outcome.request))
        assert executor.num_restarts == 1


async def test_a_video_decoded_by_two_ranks_has_the_bytes_of_degree_1(tmp_path: Path) -> None:
    small_wan.build(tmp_path)
    plain = read_card(tmp_path)
    card = dataclasses.replace(plain, execution=Execution("float32", tiling="vae"))
    assert card.tiles is not None and card.tiles.count(VIDEO) == 4
    rows = [
        Row(
            stage=stage, height=VIDEO.height, width=VIDEO.width, frames=VIDEO.frames, degree=degree,
            tokens=family_of(card).num_tokens(card, VIDEO) if stage == DENOISE else None, seconds=1.0 / degree,
        )
        for stage in (DENOISE, DECODE)
        for degree in (1, 2)
    ]  # fmt: skip
    profile = Profile(
        model=card.name, hardware="written by hand", execution=card.execution, source="tests", created="2026-01-01",
        switch_s=0.002, frame_step=card.frame_step, rows=(Row(stage=ENCODE, seconds=0.02), *rows),
    )  # fmt: skip
    async with wide_engine(card, profile, 2, adapter=None) as (engine, _):
        wish = VideoWish(num_frames=VIDEO.frames)
        asked = Generation(prompt="a fox", size=f"{VIDEO.width}x{VIDEO.height}", seed=5, num_steps=2, video=wish)
        video = await engine.generate_video(asked)
    assert decode_degrees(video.outcome) == [2]
    member = Member(video.outcome.request, 0, {})
    adapter = load_adapter(card, "cpu")
    for stage in member.request.stages:
        [left] = adapter.run(stage.kind, [member], stage.num_steps, lambda: None)
        member.states = {**member.states, stage.kind: left.tensors}
    assert isinstance(video.content, VideoFile)
    files = {name: tensor.numpy().tobytes() for name, tensor in left.tensors.items()}
    assert files == {"video": video.content.video, "thumbnail": video.content.thumbnail}


async def test_a_profile_has_decodes_at_every_degree_that_the_tiles_allow(card: ModelCard) -> None:
    pool = PoolConfig(num_ranks=2, max_batch=1)
    executor = LocalExecutor([card], pool)
    await executor.start(lambda text: None)
    heard: list[tuple[int, int]] = []
    try:
        profile = await measure(
            executor, card, pool, [ONE_TILE, SMALL], lambda done, total, text: heard.append((done, total)), share=0.0
        )
    finally:
        await executor.stop()
    rows = {(row.shape, row.degree): row for row in profile.rows_of(DECODE)}
    assert rows.keys() == {(ONE_TILE, 1), (SMALL, 1), (SMALL, 2)}
    assert {(row.tokens, row.batch) for row in rows.values()} == {(None, 1)}
    assert all(row.seconds > 0 for row in rows.values())
    num_images = 1  # encoded
    assert heard[-1] == (len(heard) - 1, len(heard) - 1) == (2 * (2 + num_images) + 3,) * 2
