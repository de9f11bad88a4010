"""Text encoders on some ranks only: what the others hold, that pictures are the same, and what a lost rank becomes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from functools import partial

import numpy as np
import pytest
import torch

from tests.waiting import HANG_S, until
from tetriserve.config import PoolConfig
from tetriserve.control import Controller
from tetriserve.control.foresight import Foresight
from tetriserve.core.events import Run
from tetriserve.core.execution import Execution
from tetriserve.core.memory import held_alike
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, ENCODE_IMAGE, image_stages
from tetriserve.engine import Generation, Intake, LiveEngine
from tetriserve.engine.progress import GeneratedImage
from tetriserve.executor.local import LocalExecutor
from tetriserve.models.adapter import Member
from tetriserve.models.card import ModelCard
from tetriserve.models.execution import place
from tetriserve.models.flux.adapter import FluxAdapter
from tetriserve.models.loading import held_bytes, load_pipeline
from tetriserve.models.ranks import stage_ranks
from tetriserve.policies import make_policy
from tetriserve.profile import Profile
from tetriserve.profile.cost import ProfileCost
from tetriserve.profiler import measure

Paint = Callable[[Request], np.ndarray]
SMALL = Shape(128, 128)
FLUX_PARTS = {"transformer", "vae", "text_encoder", "text_encoder_2"}
POOL = PoolConfig(num_ranks=2, encoder_ranks=1, max_batch=1, heartbeat_timeout_s=HANG_S)


@pytest.fixture(scope="module")
async def executor(bundled_card: ModelCard) -> AsyncIterator[LocalExecutor]:
    executor = LocalExecutor([bundled_card], POOL, adapter="faulty_flux:FaultyFlux")
    await executor.start(lambda text: None)
    yield executor
    await executor.stop()


@pytest.fixture
async def engine(executor: LocalExecutor, bundled_card: ModelCard, profile: Profile) -> AsyncIterator[LiveEngine]:
    """As `launch` puts it together; its end leaves the executor running for the next."""
    cost = ProfileCost(profile, lambda shape: bundled_card.valid_degrees(POOL.degrees))
    new_policy = partial(make_policy, "lookahead", cost, num_ranks=POOL.num_ranks, shapes=profile.shapes)
    engine = LiveEngine(
        Controller(new_policy(), cost, stage_ranks=stage_ranks([bundled_card], POOL)),
        executor, [Intake(card=bundled_card, cost=cost)],
        Foresight(new_policy), max_queue=256, policy_name="lookahead",
    )  # fmt: skip
    engine.start()
    yield engine
    await until(lambda: not engine.state.in_flight)


def runs_of(image: GeneratedImage, stage: str) -> list[Run]:
    return [run for run in image.outcome.runs if run.task.stage == stage]


def test_a_pipeline_without_text_encoders_reads_none_of_their_files(bundled_card: ModelCard) -> None:
    pipeline, _ = load_pipeline(bundled_card, torch.float32, torch.device("cpu"), has_text_encoders=False)
    assert (pipeline.text_encoder, pipeline.text_encoder_2) == (None, None)
    assert (pipeline.tokenizer, pipeline.tokenizer_2) == (None, None)
    whole, _ = load_pipeline(bundled_card, torch.float32, torch.device("cpu"))
    both = held_bytes(pipeline), held_bytes(whole)
    assert set(both[0]) == {"transformer", "vae"}
    assert set(both[1]) == FLUX_PARTS
    assert {name: both[1][name] for name in both[0]} == both[0]
    floats = sum(each.numel() for each in (*whole.vae.parameters(), *whole.vae.buffers()))
    assert both[1]["vae"] == 4 * floats


def test_without_text_encoders_offloading_them_is_nothing_to_do(bundled_card: ModelCard) -> None:
    pipeline, _ = load_pipeline(bundled_card, torch.float32, torch.device("cpu"), has_text_encoders=False)
    place(Execution("float32", offload="text_encoders"), pipeline, torch.device("cpu"))
    assert pipeline.transformer.device.type == pipeline.vae.device.type == "cpu"


def test_steps_without_text_encoders_are_those_with_them_to_the_bit(
    bundled_card: ModelCard, reference: FluxAdapter
) -> None:
    request = Request(
        request_id="r", prompt="a red circle", shape=SMALL, stages=image_stages(2), seed=3, arrival_s=0.0,
        deadline_s=0.0,
    )  # fmt: skip
    adapter = FluxAdapter(bundled_card, "cpu", has_text_encoders=False)
    embeds = reference.encode(request)
    member = Member(request, 0, {ENCODE: embeds})
    [left] = adapter.run(DENOISE, [member], 2, lambda: None)
    [expected] = reference.run(DENOISE, [member], 2, lambda: None)
    assert torch.equal(left.tensors["latents"], expected.tensors["latents"])


async def test_the_ranks_without_encoders_hold_the_transformer_and_the_vae_alone(executor: LocalExecutor) -> None:
    with_encoders, without = held_alike(executor.memory)
    assert (with_encoders.ranks, without.ranks) == ((0,), (1,))
    assert {one.name for one in with_encoders.components} == FLUX_PARTS
    assert {one.name for one in without.components} == {"transformer", "vae"}
    assert all(one.num_bytes > 1000 for one in with_encoders.components)
    assert min(*with_encoders.resident_bytes, *without.resident_bytes) > with_encoders.num_bytes


@pytest.mark.parametrize("degrees", [(1,), (2,)])
async def test_prompts_are_encoded_on_the_rank_with_encoders_and_images_are_the_same(
    engine: LiveEngine, paint: Paint, degrees: tuple[int, ...]
) -> None:
    generations = [
        Generation(prompt=f"a red circle {n}", size="256x256", num_steps=4, seed=n, degrees=degrees) for n in range(4)
    ]
    images = await asyncio.gather(*map(engine.generate, generations))
    for image in images:
        assert {run.task.ranks for run in runs_of(image, ENCODE)} == {(0,)}
        alone = await asyncio.to_thread(paint, image.outcome.request)
        worst = np.abs(image.pixels.astype(int) - alone).max()
        assert worst == 0 if degrees == (1,) else worst <= 1
    used = {rank for image in images for run in runs_of(image, DENOISE) for rank in run.task.ranks}
    assert used == {0, 1}


async def test_a_lost_rank_with_encoders_is_replaced_in_its_role_and_requests_wait_for_it(
    engine: LiveEngine, executor: LocalExecutor, paint: Paint
) -> None:
    pid, before = executor.pids[0], executor.num_restarts
    slow = asyncio.create_task(engine.generate(Generation(prompt="[slow] struck", size="256x256", num_steps=4, seed=1)))
    await until(lambda: any(flight.task.stage == ENCODE for flight in engine.state.in_flight))
    os.kill(pid, signal.SIGKILL)
    await until(lambda: engine.state.ranks == (1,))
    late = asyncio.create_task(engine.generate(Generation(prompt="comes late", size="256x256", num_steps=2, seed=2)))
    for image in await asyncio.gather(slow, late):
        assert {run.task.ranks for run in runs_of(image, ENCODE)} == {(0,)}
        assert np.abs(image.pixels.astype(int) - await asyncio.to_thread(paint, image.outcome.request)).max() <= 1
    assert executor.num_restarts == before + 1
    assert [held.ranks for held in engine.memory] == [(0,), (1,)]
    assert {one.name for one in engine.memory[0].components} == FLUX_PARTS


async def test_a_replaced_rank_without_encoders_loads_none_and_finds_what_it_warms_up_with(
    engine: LiveEngine, executor: LocalExecutor, paint: Paint
) -> None:
    os.kill(executor.pids[1], signal.SIGKILL)
    await until(lambda: engine.state.ranks == (0,))
    await until(lambda: engine.state.ranks == (0, 1))
    assert {one.name for one in executor.memory[1].components} == {"transformer", "vae"}
    image = await engine.generate(Generation(prompt="afterwards", size="256x256", num_steps=2, degrees=(2,)))
    assert np.abs(image.pixels.astype(int) - await asyncio.to_thread(paint, image.outcome.request)).max() <= 1


async def test_a_profile_is_measured_with_ranks_of_both_roles(executor: LocalExecutor, bundled_card: ModelCard) -> None:
    measured = await measure(executor, bundled_card, POOL, [SMALL], lambda done, total, text: None, share=0.0)
    assert [row.stage for row in measured.rows] == [ENCODE, DENOISE, DENOISE, ENCODE_IMAGE, DECODE]
    assert min(row.seconds for row in measured.rows) > 0
