"""Steps divided among ranks: any plan of degrees and rank sets gives the latents of degree 1."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Sequence
from itertools import combinations
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import meet, results_of
from tetriserve.config import COLLECTIVES
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.models.card import ModelCard
from tetriserve.models.checkpoint import read_card
from tetriserve.models.flux.adapter import FluxAdapter
from tetriserve.worker.team.shm import ShmTeam

TOLERANCE = 1e-4
NUM_STEPS = 3
SQUARE = Request(
    request_id="r", prompt="a red circle on a blue background", shape=Shape(256, 256), stages=image_stages(NUM_STEPS),
    seed=7, arrival_s=0.0, deadline_s=10.0,
)  # fmt: skip
REQUESTS = {
    "square": SQUARE,
    "wide": dataclasses.replace(SQUARE, shape=Shape(height=256, width=320)),
    "negative prompt": dataclasses.replace(
        SQUARE, stages=image_stages(NUM_STEPS, 2), negative_prompt="blurry", true_cfg_scale=3.0
    ),
    "tokens that two ranks do not share evenly": dataclasses.replace(
        SQUARE, shape=Shape(160, 224), max_sequence_length=39
    ),
    "fewer text tokens than ranks": dataclasses.replace(SQUARE, shape=Shape(96, 96), max_sequence_length=2),
}
PLANS = {
    "degree 2": ((0, 1),),
    "another team each step": ((0, 1), (1, 0), (0, 1)),
    "1, 2, 1": ((), (0, 1), ()),
    "2, 1, 2": ((1, 0), (), (0, 1)),
    "degree 1 again": ((),),
}
"""The ranks of each step, the last for the rest of them; none is degree 1."""

Results = dict[str, dict[str, tuple[torch.Tensor, list[int]]]]
"""Latents, and the image tokens that this rank computed in each forward, by plan and request."""


def denoise(adapter: FluxAdapter, request: Request) -> torch.Tensor:
    [latents] = denoise_together(adapter, [request])
    return latents


def denoise_together(adapter: FluxAdapter, requests: Sequence[Request], teams: Any = None) -> list[torch.Tensor]:
    """All steps; `teams`: called before each, with its number."""
    loops = [adapter.denoise_loop(request, adapter.encode(request), 0) for request in requests]
    latents = [adapter.initial_latents(request) for request in requests]
    for step in range(requests[0].num_steps):
        if teams is not None:
            adapter.use_team(teams(step))
        latents = adapter.step_together(loops, latents)
    adapter.use_team(None)
    return latents


def run_plans(team: ShmTeam, rank: int, end: Connection, model_dir: Path) -> Results:
    """One of two ranks: every request under every plan."""
    adapter = FluxAdapter(read_card(model_dir), "cpu")
    transformer = adapter.pipeline.transformer
    num_tokens: list[int] = []
    transformer.x_embedder.register_forward_pre_hook(lambda _, inputs: num_tokens.append(inputs[0].shape[1]))
    results: Results = {plan: {} for plan in PLANS}
    token = 0
    for plan, sets in PLANS.items():

        def team_of(step: int, sets: Any = sets) -> ShmTeam | None:
            nonlocal token
            token += 1
            meet(end)
            ranks = sets[min(step, len(sets) - 1)]
            if not ranks:
                return None
            team.enter(ranks, token)
            return team

        for name, request in REQUESTS.items():
            num_tokens.clear()
            [latents] = denoise_together(adapter, [request], team_of)
            results[plan][name] = latents, num_tokens.copy()
    assert [processor._parallel_config for processor in transformer.attn_processors.values()] == [None] * 6
    return results


@pytest.fixture(scope="module", params=COLLECTIVES)
def two_ranks(
    request: pytest.FixtureRequest, bundled_card: ModelCard, tmp_path_factory: pytest.TempPathFactory
) -> list[Results]:
    return results_of(run_plans, request.param, 2, tmp_path_factory.mktemp("team"), bundled_card.path)


def test_any_plan_of_degrees_gives_the_latents_of_degree_1(reference: FluxAdapter, two_ranks: list[Results]) -> None:
    for name, request in REQUESTS.items():
        alone = denoise(reference, request)
        for plan in PLANS:
            latents, other_latents = (results[plan][name][0] for results in two_ranks)
            assert torch.equal(latents, other_latents), (plan, name)
            assert (latents - alone).abs().max() < TOLERANCE, (plan, name)
        assert torch.equal(latents, alone), "degree 1 after degree 2 is the bare model"


def test_each_rank_of_degree_2_computes_half_of_the_tokens(two_ranks: list[Results]) -> None:
    for results in two_ranks:
        assert [results[plan]["square"][1] for plan in PLANS] == [
            [32, 32, 32],
            [32, 32, 32],
            [64, 32, 64],
            [32, 64, 32],
            [64, 64, 64],
        ]
        assert results["1, 2, 1"]["negative prompt"][1] == [64, 64, 32, 32, 64, 64]
    uneven = [results["degree 2"]["tokens that two ranks do not share evenly"][1] for results in two_ranks]
    assert uneven == [[18, 18, 18], [17, 17, 17]]


NUM_RANKS, NUM_TASKS = 4, 12
HEADS = 12
"""Shared by 2, 3 and 4 ranks."""


def batch_of(number: int) -> list[Request]:
    chosen = random.Random(number)
    shape = chosen.choice((Shape(64, 64), Shape(96, 160), Shape(128, 96)))
    length = chosen.choice((5, 16, 40))
    stages = image_stages(2)
    return [
        dataclasses.replace(
            SQUARE, prompt=f"{index} stars", shape=shape, seed=index, stages=stages, max_sequence_length=length
        )
        for index in range(chosen.choice((1, 2, 3)))
    ]


def sets_of(number: int) -> list[tuple[int, ...]]:
    """Disjoint sets of ranks that work at the same time, odd ones too; each runs the batch."""
    chosen = random.Random(number)
    first = chosen.choice([each for degree in (2, 3, 4) for each in combinations(range(NUM_RANKS), degree)])
    rest = tuple(rank for rank in range(NUM_RANKS) if rank not in first)
    return [first, rest] if len(rest) > 1 else [first]


def run_random_sets(team: ShmTeam, rank: int, end: Connection, model_dir: Path) -> list[list[torch.Tensor]]:
    """The latents of all tasks that this rank is a member of."""
    adapter = FluxAdapter(read_card(model_dir), "cpu")
    results = []
    for number in range(NUM_TASKS):
        for members in sets_of(number):
            if rank in members:
                team.enter(members, number + 1)
                results.append(denoise_together(adapter, batch_of(number), lambda step: team))
        meet(end)
    return results


def test_random_sets_of_four_ranks_give_the_latents_of_degree_1(bundled_card: ModelCard, tmp_path: Path) -> None:
    model = with_heads(bundled_card, HEADS, tmp_path / "model")
    adapter = FluxAdapter(read_card(model), "cpu")
    alone = [denoise_together(adapter, batch_of(number)) for number in range(NUM_TASKS)]
    results = results_of(run_random_sets, "shm", NUM_RANKS, tmp_path, model)
    for rank, latents in enumerate(results):
        mine = [number for number in range(NUM_TASKS) for members in sets_of(number) if rank in members]
        assert len(mine) == len(latents) > 0
        for number, batch in zip(mine, latents, strict=True):
            for one, expected in zip(batch, alone[number], strict=True):
                assert (one - expected).abs().max() < TOLERANCE, (rank, number)


def with_heads(card: ModelCard, num_heads: int, path: Path) -> Path:
    """The bundled model with a random transformer of so many heads."""
    from diffusers import FluxTransformer2DModel

    shutil.copytree(card.path, path)
    config = json.loads((path / "transformer/config.json").read_text())
    width = sum(config["axes_dims_rope"])
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel.from_config(
        config | {"num_attention_heads": num_heads, "attention_head_dim": width}
    )
    shutil.rmtree(path / "transformer")
    transformer.save_pretrained(path / "transformer")
    return path
