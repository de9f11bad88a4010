"""How far schedules may change an image at each dtype: the bound that `/v1/models` states, on two ranks."""

from __future__ import annotations

import dataclasses
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import results_of
from tetriserve.core.execution import DTYPES, Execution
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.models.card import TOLERANCES, ModelCard
from tetriserve.models.checkpoint import read_card
from tetriserve.models.flux.adapter import FluxAdapter
from tetriserve.worker.team.shm import ShmTeam

PROMPTS = ("a red circle on a blue background", "a green square above a yellow circle on a black background")
SIDES = (64, 128)
REPEATED = (PROMPTS[1], 64, "1, 2")
NUM_STEPS = 4
SCHEDULES = {"2": (2,), "1, 2": (1, 2), "2, 1": (2, 1)}
"""Degrees of the steps, in turns."""

Results = dict[tuple[str, str, int, str], np.ndarray]
"""Pixels by dtype, prompt, side and schedule."""


def request_of(prompt: str, side: int) -> Request:
    return Request(
        request_id="r", prompt=prompt, shape=Shape(side, side), stages=image_stages(NUM_STEPS), seed=7, arrival_s=0.0,
        deadline_s=0.0,
    )  # fmt: skip


def draw(adapter: FluxAdapter, prompt: str, side: int, teams: list[ShmTeam | None]) -> np.ndarray:
    request = request_of(prompt, side)
    loop, latents = adapter.denoise_loop(request, adapter.encode(request), 0), adapter.initial_latents(request)
    for step in range(NUM_STEPS):
        adapter.use_team(teams[step % len(teams)])
        latents = loop.step(latents)
    adapter.use_team(None)
    return adapter.decode(request, latents)


def run_rank(team: ShmTeam, rank: int, end: Connection, model_dir: Path) -> Results:
    """One of two ranks; what `REPEATED` gives is there also as `again`."""
    team.enter((0, 1), 1)
    results: Results = {}
    for dtype in DTYPES:
        adapter = FluxAdapter(dataclasses.replace(read_card(model_dir), execution=Execution(dtype)), "cpu")
        for prompt, side, (name, degrees) in product(PROMPTS, SIDES, SCHEDULES.items()):
            teams = [team if degree == 2 else None for degree in degrees]
            results[dtype, prompt, side, name] = draw(adapter, prompt, side, teams)
            if (prompt, side, name) == REPEATED:
                results[dtype, prompt, side, "again"] = draw(adapter, prompt, side, teams)
    return results


def split_results(model_dir: Path, directory: Path) -> Results:
    """What two ranks draw; both of them the same."""
    first, second = results_of(run_rank, "shm", 2, directory, model_dir)
    assert all(np.array_equal(first[key], second[key]) for key in first)
    return first  # type: ignore[no-any-return]


def test_any_schedule_stays_within_the_stated_tolerance_and_the_same_degrees_give_the_same_bits(
    bundled_card: ModelCard, tmp_path: Path
) -> None:
    """One test: the results take half a minute, and each process that runs tests would make them anew."""
    results = split_results(bundled_card.path, tmp_path)
    for dtype in DTYPES:
        adapter = FluxAdapter(dataclasses.replace(bundled_card, execution=Execution(dtype)), "cpu")
        tolerance = TOLERANCES[dtype]
        for prompt, side in product(PROMPTS, SIDES):
            alone = draw(adapter, prompt, side, [None]).astype(int)
            for name in SCHEDULES:
                levels = np.abs(results[dtype, prompt, side, name] - alone)
                assert levels.max() <= tolerance.max_levels, (dtype, prompt, side, name)
                assert levels.mean() <= tolerance.mean_levels, (dtype, prompt, side, name)
                if (dtype, prompt, side, name) == ("bfloat16", PROMPTS[1], 128, "2"):
                    assert levels.max() > TOLERANCES["float32"].max_levels, "half precision needs the wider tolerance"
        assert np.array_equal(results[dtype, *REPEATED], results[dtype, *REPEATED[:2], "again"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_steps_stay_within_the_stated_tolerance(dtype: str, bundled_card: ModelCard) -> None:
    adapter = FluxAdapter(dataclasses.replace(bundled_card, execution=Execution(dtype)), "cpu")
    tolerance = TOLERANCES[dtype]
    for side in SIDES:
        requests = [request_of(prompt, side) for prompt in (*PROMPTS, "a tan triangle")]
        loops = [adapter.denoise_loop(request, adapter.encode(request), 0) for request in requests]
        latents = [adapter.initial_latents(request) for request in requests]
        for _ in range(NUM_STEPS):
            latents = adapter.step_together(loops, latents)
        for request, shared in zip(requests, latents, strict=True):
            alone = draw(adapter, request.prompt, side, [None]).astype(int)
            levels = np.abs(adapter.decode(request, shared) - alone)
            assert levels.max() <= tolerance.max_levels, (request.prompt, side)
            assert levels.mean() <= tolerance.mean_levels, (request.prompt, side)
