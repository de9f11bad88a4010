"""Every family from `profile` to a picture: measured, simulated, and served by two workers of which one is killed."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import tetriserve.models.preload  # noqa: F401  as in workers, libraries' warnings that quote prompts are silent
from tests.gloo.test_families import CASES, PROMPT, Tiny, all_stages, built, picture
from tests.waiting import HANG_S
from tetriserve import Engine
from tetriserve.api import Picture
from tetriserve.config import PoolConfig
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, ENCODE_IMAGE
from tetriserve.executor.local import LocalExecutor
from tetriserve.launch import StartProgress, measure_profile
from tetriserve.models.registry import dummy_request
from tetriserve.policies.registry import make_policy
from tetriserve.profile import Profile, ProfileCost, Row, save_profile
from tetriserve.simulator.run import simulate

SHAPES = (Shape(64, 64), Shape(64, 96))
LARGE = Shape(1024, 1152)
"""Covers a small output beside a picture of a megapixel. Its times are made up: measuring it takes long."""
STEPS, LARGE_STEPS = 40, 4
"""Of a picture, and of one whose steps see a picture of a megapixel."""
MAX_LEVELS = 1


@pytest.fixture(scope="module", params=[name for name in CASES if not name.startswith("wan")])  # test_video_serving
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return built(CASES[request.param], tmp_path_factory.mktemp(request.param))


def test_a_family_is_measured_simulated_and_served_though_a_worker_is_killed(tiny: Tiny, tmp_path: Path) -> None:
    measuring = measure_profile(str(tiny.card.path), PoolConfig(num_ranks=2, max_batch=2), SHAPES, StartProgress())
    card, profile = asyncio.run(measuring)
    degrees = card.valid_degrees((1, 2))
    stages = {ENCODE, DENOISE, DECODE} | ({ENCODE_IMAGE} if card.max_images else set())
    assert {row.stage for row in profile.rows} == stages
    assert {row.degree for row in profile.rows if row.stage == DENOISE} == set(degrees)
    check_simulation(tiny, profile)

    save_profile(covering_pictures(tiny, profile), tmp_path / "profile.json")
    images = [picture(96, 64)] if card.min_images else []
    num_steps = LARGE_STEPS if images else STEPS
    with Engine(str(card.path), ranks=2, max_batch=2, profile=str(tmp_path / "profile.json")) as engine:
        pictures = drawn_through_a_kill(engine, num_steps, images)
    for seed, drawn in enumerate(pictures):
        request = drawn.outcome.request
        assert (request.seed, request.num_steps, request.images) == (seed, num_steps, (Shape(96, 64),) * len(images))
        expected = all_stages(tiny.adapter(), request, *images)
        difference = np.abs(np.asarray(drawn.image).astype(int) - expected).max()
        assert difference <= MAX_LEVELS, (seed, difference)


def check_simulation(tiny: Tiny, profile: Profile) -> None:
    """Requests under the default policy, as the profile says."""
    cost = ProfileCost(profile, lambda shape: tiny.card.valid_degrees((1, 2)))
    policy = make_policy("lookahead", cost, num_ranks=2, shapes=profile.shapes)
    requests = [
        dataclasses.replace(dummy_request(tiny.card, shape, f"r{number}", 5), arrival_s=0.01 * number, deadline_s=1e3)
        for number, shape in enumerate(SHAPES * 3)
    ]
    outcomes = list(simulate(policy, cost, requests, num_ranks=2))
    assert len(outcomes) == 6 and all(outcome.is_attained for outcome in outcomes)


def covering_pictures(tiny: Tiny, profile: Profile) -> Profile:
    if not tiny.card.min_images:
        return profile
    tokens_per_pixel = next(row.tokens / row.shape.num_pixels for row in profile.rows if row.tokens and row.shape)
    tokens = round(LARGE.num_pixels * tokens_per_pixel)
    large = {"height": LARGE.height, "width": LARGE.width}
    rows = (
        *(Row(stage=DENOISE, **large, tokens=tokens, degree=degree, seconds=2.0) for degree in profile.degrees),
        Row(stage=ENCODE_IMAGE, **large, seconds=1.0),
        Row(stage=DECODE, **large, seconds=1.0),
    )
    return dataclasses.replace(profile, rows=(*profile.rows, *rows))


def drawn_through_a_kill(engine: Engine, num_steps: int, images: Sequence[np.ndarray]) -> list[Picture]:
    """Two pictures, while whose steps are made rank 1 dies."""
    pictures: dict[int, Picture] = {}

    def draw(seed: int) -> None:
        pictures[seed] = engine.generate(
            PROMPT, images=images, size="64x96", seed=seed, num_steps=num_steps, slo_s=20 * HANG_S
        )

    live = engine._live
    assert live is not None
    executor = live._executor
    assert isinstance(executor, LocalExecutor)
    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    wait(lambda: any(trajectory.steps_done for trajectory in live.state.trajectories), "no step was made")
    os.kill(executor.pids[1], signal.SIGKILL)
    for thread in threads:
        thread.join(20 * HANG_S)
    wait(lambda: executor.num_restarts >= 1, "the worker was not replaced")
    return [pictures[seed] for seed in range(2)]


def wait(until: Callable[[], bool], problem: str) -> None:
    give_up_at = time.monotonic() + 5 * HANG_S
    while not until():
        assert time.monotonic() < give_up_at, problem
        time.sleep(0.005)
