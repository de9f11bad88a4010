"""Decode in tiles divided among ranks: at every degree the bits of degree 1, which are the pipeline's."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from json import dumps as json_of
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tetriserve.models.preload  # noqa: F401  as in workers, libraries' warnings that quote prompts are silent
from tests.families.case import FamilyCase, call_pipeline
from tests.families.flux import FLUX
from tests.families.flux2 import FLUX2_KLEIN
from tests.families.qwen_image import QWEN_IMAGE
from tests.families.wan import WAN, WAN_5B
from tests.gloo.test_families import Tiny, all_stages, built
from tests.ranks import meet, ranks, results_of
from tests.waiting import HANG_S
from tetriserve.config import COLLECTIVES
from tetriserve.core.events import FailureKind, StartTask, Work
from tetriserve.core.execution import Execution
from tetriserve.core.messages import RunTask, TaskError
from tetriserve.core.plan import Task
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.models import tiled_decode
from tetriserve.models.adapter import Member
from tetriserve.models.card import ModelCard
from tetriserve.models.checkpoint import read_card
from tetriserve.models.diffusion import DiffusionAdapter
from tetriserve.models.registry import dummy_request, load_adapter
from tetriserve.models.tiled_decode import dealt
from tetriserve.models.tiles import Tiles, read_tiles
from tetriserve.models.wan.adapter import WanAdapter
from tetriserve.worker.runner import Runner
from tetriserve.worker.store import TensorStore
from tetriserve.worker.team.shm import ShmTeam

SHAPES = {
    FLUX.name: Shape(96, 160), FLUX2_KLEIN.name: Shape(128, 96), QWEN_IMAGE.name: Shape(96, 128),
    WAN.name: Shape(80, 144, 9), WAN_5B.name: Shape(96, 128, 5),
}  # fmt: skip
"""Of several tiles, those at the edges smaller than the others."""
SIDE, STRIDE = 64, 48
"""Of tiles, in pixels: those of the tiny VAEs of pictures, set for those of videos, whose own take long."""
CASES = [FLUX, FLUX2_KLEIN, QWEN_IMAGE, WAN, WAN_5B]
BANDS = (tiled_decode.BAND_BYTES, 1)
TEAMS = ((0, 1), (1, 0), (2, 0, 1), (3, 1, 0, 2))
NUM_RANKS = 4


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiled(request.param, tmp_path_factory.mktemp(request.param.name))


def tiled(case: FamilyCase, path: Path) -> Tiny:
    return dataclasses.replace(plain := built(case, path), card=with_tiling(plain.card))


def with_tiling(card: ModelCard) -> ModelCard:
    return dataclasses.replace(card, execution=Execution("float32", tiling="vae"))


def tiled_adapter(card: ModelCard) -> DiffusionAdapter:
    adapter = load_adapter(with_tiling(card), "cpu")
    assert isinstance(adapter, DiffusionAdapter)
    enable_small_tiles(adapter.pipeline.vae)
    return adapter


def enable_small_tiles(vae: Any) -> None:
    if hasattr(vae, "tile_sample_min_height"):
        vae.enable_tiling(SIDE, SIDE, STRIDE, STRIDE)
    else:
        vae.enable_tiling()


def small_tiles(card: ModelCard) -> Tiles:
    """As `enable_small_tiles` cuts."""
    assert card.tiles is not None
    scale = card.tiles.scale
    return Tiles(SIDE // scale, STRIDE // scale, scale)


def member_of(adapter: DiffusionAdapter, shape: Shape) -> Member:
    """A request before its decode, with noise for latents."""
    request = dummy_request(adapter.card, shape, "r", 2)
    return Member(request, 0, {ENCODE: {}, DENOISE: {"latents": adapter.initial_latents(request)}})


def decoded(adapter: DiffusionAdapter, shape: Shape, on_part: Callable[[], None] = lambda: None) -> Any:
    """Pixels, of a video those that its file was made of; None on members that do not lead."""
    frames = kept_frames(adapter) if isinstance(adapter, WanAdapter) else []
    [left] = adapter.run(DECODE, [member_of(adapter, shape)], 0, on_part)
    if not adapter.card.makes_videos:
        return left.tensors.get("pixels")
    assert {*left.tensors} == ({"video", "thumbnail"} if frames else set())
    return torch.from_numpy(np.concatenate(frames)) if frames else None


def kept_frames(adapter: WanAdapter) -> list[np.ndarray]:
    """The frames of the next decode."""
    kept: list[np.ndarray] = []

    def frames(latents: torch.Tensor) -> Iterator[np.ndarray]:
        for piece in WanAdapter.frames(adapter, latents):
            kept.append(piece.copy())
            yield piece

    adapter.frames = frames  # type: ignore[method-assign]
    return kept


@dataclasses.dataclass(frozen=True)
class Part:
    """What a member has of one decode: its place in the team, what is left, and how many tiles of frames it decoded."""

    shape: Shape
    band_bytes: int
    members: tuple[int, ...]
    index: int
    pixels: torch.Tensor | None
    num_tiles: int


def decode_in_teams(team: ShmTeam, rank: int, end: Connection, path: Path, shapes: Sequence[Shape]) -> list[Part]:
    """Every shape in every team that has this rank, then alone; with all rows of tiles in a band, and with one."""
    adapter = tiled_adapter(read_card(path))
    parts: list[Part] = []
    token = 0
    for shape, members in product(shapes, (*TEAMS, (rank,))):
        for band_bytes in BANDS:
            tiled_decode.BAND_BYTES = band_bytes
            token += 1
            meet(end)
            if rank not in members:
                continue
            if len(members) > 1:
                team.enter(members, token)
            adapter.use_team(team if len(members) > 1 else None)
            tiles: list[int] = []
            pixels = decoded(adapter, shape, partial(tiles.append, 1))
            parts.append(Part(shape, band_bytes, members, members.index(rank), pixels, len(tiles)))
    return parts


@pytest.mark.parametrize("collectives", COLLECTIVES)
def test_any_team_decodes_to_the_bits_of_degree_1_and_divides_the_tiles(
    tiny: Tiny, collectives: str, tmp_path: Path
) -> None:
    if collectives == "torch" and tiny.case is not FLUX:
        return  # what is exchanged differs in its size alone
    adapter, shape, tiles = tiled_adapter(tiny.card), SHAPES[tiny.case.name], small_tiles(tiny.card)
    one_tile = Shape(64, 64, shape.frames)
    assert tiles.count(shape) >= NUM_RANKS and tiles.count(one_tile) == 1
    expected = {each: decoded(adapter, each) for each in (shape, one_tile)}
    by_rank = results_of(decode_in_teams, collectives, NUM_RANKS, tmp_path, tiny.card.path, [*expected])
    parts = [part for results in by_rank for part in results]
    assert len(parts) == len(expected) * len(BANDS) * (sum(map(len, TEAMS)) + NUM_RANKS)
    for part in parts:
        is_helper = part.index > 0 and part.shape == shape
        assert (part.pixels is None) == is_helper, "the leader has the picture; what is not cut, all have"
        assert is_helper or torch.equal(part.pixels, expected[part.shape]), part.members
    for members in TEAMS:
        counts = [part.num_tiles for part in parts if (part.shape, part.members) == (shape, members)]
        num_parts = tiles.count(shape) * (1 + (shape.frames - 1) // 4)
        assert sum(counts) == len(BANDS) * num_parts
        assert max(counts) < num_parts, "a member decodes its part of them"


def test_degree_1_has_the_bits_of_the_pipeline_with_tiling(tiny: Tiny) -> None:
    request = tiny.request(num_steps=2, shape=SHAPES[tiny.case.name])
    pixels, pipeline = all_stages(tiled_adapter(tiny.card), request), tiny.pipeline()

    def called() -> np.ndarray:
        return np.asarray(call_pipeline(tiny.case, pipeline, request, tiny.card.num_text_tokens, "pil"))

    assert not np.array_equal(pixels, called()), "tiling changes nothing here"
    enable_small_tiles(pipeline.vae)
    try:
        assert np.array_equal(pixels, called())
    finally:
        pipeline.vae.disable_tiling()


@contextmanager
def counted_tiles(vae: Any) -> Iterator[list[torch.Size]]:
    """The shapes of what the VAE's decoder is given."""
    seen: list[torch.Size] = []
    hook = vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    try:
        yield seen
    finally:
        hook.remove()


def test_as_many_tiles_are_counted_without_torch_as_diffusers_decodes(tiny: Tiny) -> None:
    adapter, tiles, multiple = tiled_adapter(tiny.card), small_tiles(tiny.card), tiny.card.size_multiple
    sides = {round(number * SIDE / multiple) * multiple for number in (0.5, 0.75, 1, 1.25, 1.8)}
    for shape in (Shape(height, width) for height in sides for width in sides):
        with counted_tiles(adapter.pipeline.vae) as seen:
            decoded(adapter, shape)
        assert len(seen) == tiles.count(shape), shape


def test_the_cards_tiles_are_those_that_its_vae_is_made_with(tiny: Tiny) -> None:
    adapter, tiles = load_adapter(tiny.card, "cpu"), tiny.card.tiles
    assert isinstance(adapter, DiffusionAdapter) and tiles is not None
    vae = adapter.pipeline.vae
    if tiny.case in (FLUX, FLUX2_KLEIN):
        side, sample = vae.tile_latent_min_size, vae.tile_sample_min_size
        assert tiles == Tiles(side, int(side * (1 - vae.tile_overlap_factor)), sample // side)
    else:
        scale = vae.spatial_compression_ratio
        assert vae.tile_sample_min_height == vae.tile_sample_min_width
        assert vae.tile_sample_stride_height == vae.tile_sample_stride_width
        assert tiles == Tiles(vae.tile_sample_min_height // scale, vae.tile_sample_stride_height // scale, scale)


def test_published_vaes_are_cut_as_diffusers_cuts_them(tmp_path: Path) -> None:
    for name, config, tiles in (
        ("AutoencoderKL", {"sample_size": 1024, "block_out_channels": [128, 256, 512, 512]}, Tiles(128, 96, 8)),
        ("AutoencoderKLFlux2", {"sample_size": 1024, "block_out_channels": [128, 256, 512, 512]}, Tiles(128, 96, 8)),
        ("AutoencoderKLQwenImage", {"temperal_downsample": [False, True, True]}, Tiles(32, 24, 8)),
        ("AutoencoderKLWan", {}, Tiles(32, 24, 8)),
        ("AutoencoderKLWan", {"patch_size": 2, "scale_factor_spatial": 16}, Tiles(16, 12, 16)),
        ("AutoencoderTiny", {"sample_size": 1024, "block_out_channels": [64, 64]}, None),
        ("AutoencoderKL", {"sample_size": [64, 64], "block_out_channels": [64, 64]}, None),
        ("AutoencoderKL", {"sample_size": 100, "block_out_channels": [64, 64, 64, 64]}, None),
        ("AutoencoderKLWan", {"scale_factor_spatial": 10}, None),
    ):
        path = tmp_path / "vae"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json_of({"_class_name": name, **config}))
        assert read_tiles(tmp_path) == tiles, (name, config)


def test_tiles_are_dealt_so_that_no_member_has_much_more_than_another() -> None:
    sizes = [4, 4, 4, 2, 4, 4, 4, 2, 2, 2, 2, 1]
    for degree in range(1, 8):
        shares = dealt(sizes, degree)
        assert sorted(number for share in shares for number in share) == list(range(len(sizes)))
        loads = [sum(sizes[number] for number in share) for share in shares]
        assert max(loads) - min(loads) <= max(sizes)
        assert shares == dealt(sizes, degree)
    assert dealt([1], 3) == [[0], [], []]


def decode_and_die(team: ShmTeam, rank: int, end: Connection, path: Path, shape: Shape, unlucky: int) -> Any:
    """A decode by all ranks, of which one is killed with its first tile; what a survivor answers, and its tiles."""
    adapter, store, num_tiles = tiled_adapter(read_card(path)), TensorStore(path), 0
    member = member_of(adapter, shape)
    states = {stage: store.save(f"{stage}-{rank}", dict(tensors)) for stage, tensors in member.states.items()}

    def after_a_tile(*_: object) -> None:
        nonlocal num_tiles
        num_tiles += 1
        if rank == unlucky:
            os.kill(os.getpid(), signal.SIGKILL)
        end.send("tile")
        assert end.poll(HANG_S) and end.recv() == "aborted"

    adapter.pipeline.vae.decoder.register_forward_hook(after_a_tile)
    runner = Runner({"": adapter}, team, store, rank, "cpu", 0)
    work = Work(member.request, len(member.request.stages) - 1, 0, states)
    answer = runner.run(RunTask(StartTask(1, Task(("r",), DECODE, tuple(range(NUM_RANKS))), (work,)), token=1))
    return answer, num_tiles


@pytest.mark.parametrize("unlucky", [0, 2])
def test_members_leave_a_decode_after_the_tile_in_which_one_is_lost(unlucky: int, tmp_path: Path) -> None:
    card = tiled(FLUX, tmp_path / "model").card
    with ranks(decode_and_die, "shm", NUM_RANKS, tmp_path, card.path, SHAPES[FLUX.name], unlucky) as made:
        survivors = [rank for rank in range(NUM_RANKS) if rank != unlucky]
        made.processes[unlucky].join()
        assert [made.hear(rank) for rank in survivors] == ["tile"] * len(survivors)
        made.region.abort(range(NUM_RANKS), 1)
        for rank in survivors:
            made.ends[rank].send("aborted")
        for rank in survivors:
            answer, num_tiles = made.hear(rank)
            assert isinstance(answer, TaskError) and answer.kind is FailureKind.LOST
            assert num_tiles == 1
