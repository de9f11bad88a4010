"""Previews of the bundled model: made of latents on their way, they show the picture that comes out."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest
import torch

from tetriserve.config import EngineConfig, ModelConfig, PoolConfig, SchedulingConfig
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.engine import GeneratedImage, Generation
from tetriserve.engine import Progress as Told
from tetriserve.launch import StartProgress, launch
from tetriserve.models.card import ModelCard
from tetriserve.models.flux.adapter import FluxAdapter
from tetriserve.models.preview import Latents, fit_basis, project

REQUEST = Request(
    request_id="r", prompt="a red circle on a blue background", shape=Shape(256, 320), stages=image_stages(10), seed=3,
    arrival_s=0.0, deadline_s=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def course(reference: FluxAdapter) -> list[Latents]:
    """The latents before the first step and after each."""
    loop = reference.denoise_loop(REQUEST, reference.encode(REQUEST), 0)
    latents = reference.initial_latents(REQUEST)
    course = [Latents(latents[0].numpy(), loop.noise_level)]
    for _ in range(REQUEST.num_steps):
        latents = loop.step(latents)
        course.append(Latents(latents[0].numpy(), loop.noise_level))
    return course


def test_the_noise_level_falls_from_one_to_zero(course: list[Latents], reference: FluxAdapter) -> None:
    levels = [latents.noise_level for latents in course]
    assert levels[0] == 1.0
    assert levels[-1] == 0.0
    assert levels == sorted(levels, reverse=True)
    resumed = reference.denoise_loop(REQUEST, reference.encode(REQUEST), 4)
    assert resumed.noise_level == levels[4]


def test_latents_of_pixels_decode_to_them(reference: FluxAdapter) -> None:
    pixels = np.full((256, 320, 3), (34, 75, 220), np.uint8)
    pixels[100:180, 40:180] = 230, 220, 40
    latents = reference.latents_of(pixels)
    assert latents.shape == (1, (256 // 32) * (320 // 32), 64)
    assert latents.dtype == torch.float32
    decoded = reference.decode(REQUEST, latents)
    assert np.abs(decoded.astype(float) - pixels).mean() < 12


def test_half_way_a_preview_is_nearer_to_the_picture_than_its_mean_colour(
    course: list[Latents], reference: FluxAdapter, bundled_card: ModelCard
) -> None:
    final = reference.decode(REQUEST, torch.from_numpy(course[-1].tokens)[None])
    shrunk = final.reshape(16, 16, 20, 16, 3).mean(axis=(1, 3))
    preview = project(fit_basis(reference, bundled_card), course[5], course[3], 8, 10)
    assert preview.shape == (16, 20, 3)
    error = np.abs(preview - shrunk).mean()
    assert error < 0.6 * np.abs(shrunk - shrunk.mean(axis=(0, 1))).mean() + 15
    unrelated = dataclasses.replace(course[5], tokens=course[0].tokens)
    assert error < 0.5 * np.abs(project(fit_basis(reference, bundled_card), unrelated, None, 8, 10) - shrunk).mean()


async def test_a_live_engine_previews_what_its_workers_left_and_they_come_ever_nearer(profile_path: str) -> None:
    config = EngineConfig(
        models=(ModelConfig(profile=profile_path),),
        pool=PoolConfig(num_ranks=2),
        scheduling=SchedulingConfig(policy="lookahead"),
    )
    engine = (await launch(config, StartProgress())).engine
    told: asyncio.Queue[Told | GeneratedImage] = asyncio.Queue()
    generation = Generation(prompt=REQUEST.prompt, size="512x512", num_steps=20, seed=3, slo_s=60.0)
    making = asyncio.create_task(engine.generate_all([generation], lambda number, update: told.put_nowait(update)))
    previews = []
    before = None
    while not isinstance(update := await told.get(), GeneratedImage):
        if update.latents is not None:
            preview = await asyncio.to_thread(engine.previews.read, update.request, update.latents, before)
            if preview is not None:
                before = preview.latents
                previews.append(preview.pixels.astype(float))
    (image,) = await making
    await engine.stop()
    assert len(previews) >= 3
    shrunk = image.pixels.reshape(32, 16, 32, 16, 3).mean(axis=(1, 3))
    errors = [np.abs(preview - shrunk).mean() for preview in previews]
    assert errors[-1] < errors[0]
    assert errors[-1] < 40
