"""Two models in one pool: the pictures of each served alone, on the ranks that hold it, through deaths and restarts."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.families.sd3 import build as build_sd3
from tests.waiting import HANG_S, until
from tetriserve.config import EngineConfig, JournalConfig, ModelConfig, PoolConfig
from tetriserve.core.errors import RequestFailed, ShuttingDown, UnknownModel
from tetriserve.core.execution import Execution
from tetriserve.core.memory import HeldAlike
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, ENCODE_IMAGE
from tetriserve.engine import GeneratedImage, Generation, Jobs, JournalledJobs, LiveEngine
from tetriserve.executor.local import LocalExecutor
from tetriserve.journal import Key
from tetriserve.launch import StartProgress, launch
from tetriserve.models.checkpoint import read_card
from tetriserve.models.registry import family_of
from tetriserve.profile import Profile, ProfileCost, Row, load_profile, save_profile
from tetriserve.profile.by_model import CostByModel

DRAWINGS, PHOTOS = "drawings", "photos"
SIZES = {DRAWINGS: "256x256", PHOTOS: "64x96"}
STEPS = {DRAWINGS: 6, PHOTOS: 12}
SHAPES = (Shape(64, 64), Shape(96, 96))
"""That the profile of the tiny SD3 covers."""


@pytest.fixture(scope="module")
def models(
    bundled_dir: Path, profile_path: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelConfig, ModelConfig]:
    """The bundled FLUX, and a tiny SD3 with random weights, each with a profile."""
    folder = tmp_path_factory.mktemp("sd3")
    build_sd3(folder)
    (folder / "tetriserve.json").write_text(
        json.dumps({"dtype": "float32", "max_sequence_length": 64, "sizes": [*map(str, SHAPES)], "num_steps": 6})
    )
    card = read_card(folder)
    profile = Profile(
        model=card.name, fingerprint=card.fingerprint, hardware="written by hand", execution=Execution("float32"),
        source="tests", created="2026-01-01", switch_s=0.002,
        rows=(
            Row(stage=ENCODE, seconds=0.01),
            *(
                Row(
                    stage=DENOISE, height=shape.height, width=shape.width,
                    tokens=family_of(card).num_tokens(card, shape), degree=degree, seconds=0.02 / degree,
                )
                for shape in SHAPES
                for degree in (1, 2)
            ),
            *(
                Row(stage=stage, height=shape.height, width=shape.width, seconds=0.02)
                for stage in (ENCODE_IMAGE, DECODE)
                for shape in SHAPES
            ),
        ),
    )  # fmt: skip
    path = folder / "profile.json"
    save_profile(profile, path)
    return (
        ModelConfig(name=DRAWINGS, path=str(bundled_dir), profile=profile_path),
        ModelConfig(name=PHOTOS, path=str(folder), profile=str(path)),
    )


@asynccontextmanager
async def launched(*models: ModelConfig, **settings: Any) -> AsyncIterator[Jobs]:
    config = EngineConfig(models=models, pool=PoolConfig(num_ranks=2, heartbeat_timeout_s=HANG_S), **settings)
    jobs = await launch(config, StartProgress())
    try:
        yield jobs
    finally:
        await jobs.stop()


def workers_of(engine: LiveEngine) -> LocalExecutor:
    assert isinstance(engine._executor, LocalExecutor)
    return engine._executor


def generation(name: str, seed: int, **fields: Any) -> Generation:
    said = {"prompt": f"a red circle {seed}", "size": SIZES[name], "num_steps": STEPS[name], "slo_s": 20 * HANG_S}
    return Generation(**{**said, "seed": seed, "model": name, **fields})


def parts_of(held: HeldAlike) -> set[str]:
    return {component.name for component in held.components}


def ranks_used(image: GeneratedImage) -> set[int]:
    return {rank for run in image.outcome.runs for rank in run.task.ranks}


def distance(image: GeneratedImage, other: GeneratedImage) -> int:
    return int(np.abs(image.pixels.astype(int) - other.pixels).max())


@pytest.fixture(scope="module")
async def alone(models: tuple[ModelConfig, ModelConfig]) -> dict[tuple[str, int], list[GeneratedImage]]:
    """What each model draws where no other is served, by its name and by degree; seeds count from 0."""
    drawn = {}
    for model in models:
        async with launched(replace(model, name="")) as jobs:
            assert jobs.engine.models.first.card.key == ""
            for degree in (1, 2):
                asked = [generation(model.name, seed, degrees=(degree,), model=None) for seed in range(2)]
                drawn[model.name, degree] = list(await asyncio.gather(*map(jobs.engine.generate, asked)))
    return drawn


@pytest.fixture(scope="module")
async def engine(models: tuple[ModelConfig, ModelConfig]) -> AsyncIterator[LiveEngine]:
    async with launched(*models) as jobs:
        yield jobs.engine


async def test_two_models_at_once_draw_the_bits_of_each_alone(
    engine: LiveEngine, alone: dict[tuple[str, int], list[GeneratedImage]]
) -> None:
    cases = [(name, degree, seed) for seed in range(2) for degree in (1, 2) for name in (DRAWINGS, PHOTOS)]
    asked = [generation(name, seed, degrees=(degree,)) for name, degree, seed in cases]
    images = await asyncio.gather(*map(engine.generate, asked))
    for (name, degree, seed), image in zip(cases, images, strict=True):
        assert image.outcome.request.model == name
        assert set(image.outcome.degrees) == {degree}
        assert np.array_equal(image.pixels, alone[name, degree][seed].pixels), (name, degree, seed)
    (held,) = engine.memory
    assert held.ranks == (0, 1)
    assert {component.model for component in held.components} == {DRAWINGS, PHOTOS}


async def test_one_scheduler_learns_of_each_model_by_itself_and_quotes_by_model(engine: LiveEngine) -> None:
    before = engine.controller.cost
    assert isinstance(before, CostByModel)
    await engine.generate(generation(PHOTOS, 5))
    after = engine.controller.cost
    assert isinstance(after, CostByModel)
    learnt = {
        name: cost.corrections != known.corrections
        for (name, cost), known in zip(after.costs.items(), before.costs.values(), strict=True)
        if isinstance(cost, ProfileCost) and isinstance(known, ProfileCost)
    }
    assert learnt == {DRAWINGS: False, PHOTOS: True}
    for name in (DRAWINGS, PHOTOS):
        quote = await engine.quote([generation(name, 1, degrees=(1,))])
        request = engine._requests([generation(name, 1, degrees=(1,))])[0]
        alone_s = STEPS[name] * after.times(request, request.stepped)[1]
        assert alone_s < quote.finish_s - quote.arrival_s < 3 * alone_s + 1
    with pytest.raises(UnknownModel, match="model 'video' is not served; served: 'drawings', 'photos'"):
        await engine.quote([generation(DRAWINGS, 1, model="video")])


async def test_a_killed_worker_costs_neither_model_a_picture(
    engine: LiveEngine, alone: dict[tuple[str, int], list[GeneratedImage]]
) -> None:
    workers = workers_of(engine)
    num_restarts = workers.num_restarts
    names = (DRAWINGS, PHOTOS)
    asked = [generation(name, seed) for seed in range(2) for name in names]
    drawing = asyncio.gather(*map(engine.generate, asked))
    await until(lambda: any(trajectory.steps_done for trajectory in engine.state.trajectories))
    os.kill(workers.pids[1], signal.SIGKILL)
    images = await drawing
    for image, one in zip(images, asked, strict=True):
        assert one.model is not None and one.seed is not None
        assert distance(image, alone[one.model, 1][one.seed]) <= 1
    await until(lambda: engine.state.ranks == (0, 1))
    assert workers.num_restarts == num_restarts + 1
    assert [held.ranks for held in engine.memory] == [(0, 1)]


async def test_a_rank_loads_measures_and_runs_the_models_that_are_its_own(
    models: tuple[ModelConfig, ModelConfig],
    alone: dict[tuple[str, int], list[GeneratedImage]],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    drawings, photos = models
    with caplog.at_level(logging.INFO):
        starting = launched(drawings, replace(photos, ranks=(1,), profile=None))
        jobs = await starting.__aenter__()
    try:
        engine = jobs.engine
        assert "degrees 2 are not used: a degree is at most the number of ranks that hold photos, 1" in caplog.messages
        assert any(message.startswith("rank 0 holds ") and PHOTOS not in message for message in caplog.messages)
        (kept,) = (tmp_path / "tetriserve" / "profiles").iterdir()
        measured = load_profile(kept)
        assert (measured.model, measured.degrees, measured.shapes) == (PHOTOS, (1,), SHAPES)
        assert engine.models.called(PHOTOS).cost.profile == measured
        await check_roles(engine, alone)
        for rank in (0, 1):
            os.kill(workers_of(engine).pids[rank], signal.SIGKILL)
            await until(lambda lost=rank: lost not in engine.state.ranks)
            waiting = asyncio.create_task(engine.generate(generation(PHOTOS, 1)))
            assert ranks_used(await waiting) == {1}
            await until(lambda: engine.state.ranks == (0, 1))
        await check_roles(engine, alone)
    finally:
        await starting.__aexit__(None, None, None)
    assert kept.with_suffix(".corrections.json").is_file()
    assert len([*kept.parent.iterdir()]) == 2, "what was learnt of a named profile is not kept"


async def check_roles(engine: LiveEngine, alone: dict[tuple[str, int], list[GeneratedImage]]) -> None:
    """Rank 1 alone holds the photos' model."""
    assert [held.ranks for held in engine.memory] == [(0,), (1,)]
    assert [held.ranks for held in engine.memory_of(DRAWINGS)] == [(0, 1)]
    (held,) = engine.memory_of(PHOTOS)
    assert held.ranks == (1,)
    assert parts_of(held) == {"transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"}
    asked = [generation(name, seed) for seed in range(2) for name in (DRAWINGS, PHOTOS)]
    images = await asyncio.gather(*map(engine.generate, asked))
    for image, one in zip(images, asked, strict=True):
        assert one.model is not None and one.seed is not None
        assert distance(image, alone[one.model, 1][one.seed]) <= 1
        assert one.model == DRAWINGS or ranks_used(image) == {1}
    assert {rank for image in images for rank in ranks_used(image)} == {0, 1}


async def test_text_encoders_are_on_the_first_ranks_of_each_model(models: tuple[ModelConfig, ModelConfig]) -> None:
    pool = PoolConfig(num_ranks=3, encoder_ranks=1, heartbeat_timeout_s=HANG_S)
    drawings, photos = models
    config = EngineConfig(models=(replace(drawings, ranks=(0, 1)), replace(photos, ranks=(1, 2))), pool=pool)
    engine = (await launch(config, StartProgress())).engine
    try:
        for name, ranks in ((DRAWINGS, (0, 1)), (PHOTOS, (1, 2))):
            with_encoders, without = engine.memory_of(name)
            assert (with_encoders.ranks, without.ranks) == (ranks[:1], ranks[1:])
            assert parts_of(without) == {"transformer", "vae"}
            images = await asyncio.gather(*(engine.generate(generation(name, seed)) for seed in range(3)))
            encoders = {run.task.ranks for image in images for run in image.outcome.runs if run.task.stage == ENCODE}
            assert encoders == {ranks[:1]}
            assert {rank for image in images for rank in ranks_used(image)} <= set(ranks)
    finally:
        await engine.stop()


async def test_a_restart_goes_on_with_the_models_it_serves_and_fails_what_is_of_another(
    models: tuple[ModelConfig, ModelConfig],
    alone: dict[tuple[str, int], list[GeneratedImage]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    journal = JournalConfig(directory=str(tmp_path / "journal"))
    asked = {name: [generation(name, 0, num_steps=40)] for name in (DRAWINGS, PHOTOS)}
    keys = {name: Key("client", name) for name in asked}
    async with launched(*models, journal=journal) as jobs:
        calls = {name: jobs.call(keys[name], asked[name]) for name in asked}
        await until(lambda: len(jobs.engine.state.trajectories) == 2)
        await until(lambda: all(one.steps_done for one in jobs.engine.state.trajectories))
        await jobs.stop()
        for call in calls.values():
            with pytest.raises(ShuttingDown):
                await call.images()

    async with launched(*reversed(models), journal=journal) as jobs:
        assert isinstance(jobs, JournalledJobs)
        assert jobs.num_resumed == 2 and jobs.num_steps_saved > 0
        await until(lambda: all(one.steps_done for one in jobs.engine.state.trajectories))

    async with launched(models[0], journal=journal) as jobs:
        assert isinstance(jobs, JournalledJobs)
        assert jobs.num_resumed == 1
        (line,) = [message for message in caplog.messages if "was not taken up" in message]
        assert line.endswith(
            "was not taken up: it was accepted for the model 'photos', with which this server was not started again: "
            "ask anew, or have it started with that --model"
        )
        with pytest.raises(RequestFailed, match="it was accepted for the model 'photos'"):
            await jobs.call(keys[PHOTOS], asked[PHOTOS]).images()
        (image,) = await jobs.call(keys[DRAWINGS], asked[DRAWINGS]).images()
        whole = await jobs.engine.generate(generation(DRAWINGS, 0, num_steps=40, degrees=(1,)))
        assert distance(image, whole) <= 1
