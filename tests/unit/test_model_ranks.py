"""Which ranks hold which models: what each loads, may run, is measured on, and has memory for."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, cast

import pytest

from tests.unit.measured_executor import MeasuredExecutor, quiet_s
from tetriserve.config import EngineConfig, ModelConfig, PoolConfig
from tetriserve.core.cluster import StageRanks
from tetriserve.core.errors import ConfigError
from tetriserve.core.execution import Execution
from tetriserve.core.memory import Component, RankMemory, held_alike, held_of
from tetriserve.core.plan import Task
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.launch import find_cards, find_model
from tetriserve.models.card import ModelCard
from tetriserve.models.ranks import pool_of, stage_ranks
from tetriserve.models.sizes import weight_bytes
from tetriserve.profile import Profile, ProfileCost
from tetriserve.profiler import hardware_name, measure, warm_up
from tetriserve.profiler.memory import check_memory
from tetriserve.profiles import cached_profile_path
from tetriserve.worker.spec import WorkerSpec

CARD = ModelCard(
    name="images", path=Path("images"), family="flux", pipeline_class="FluxPipeline", execution=Execution("float32"),
    size_multiple=32, pixels_per_token=32, num_heads=8, num_text_tokens=64, default_num_steps=20,
    default_guidance_scale=3.5, has_guidance=True, has_negative_prompt=True, sizes=(Shape(256, 256),),
    fingerprint="abc", key="images",
)  # fmt: skip
VIDEO = dataclasses.replace(CARD, name="video", key="video", ranks=(1, 2, 4))
POOL = PoolConfig(num_ranks=6, encoder_ranks=2)


def test_ranks_run_the_stages_of_the_models_that_they_hold_and_the_first_of_each_encode() -> None:
    assert stage_ranks([CARD, VIDEO], POOL) == StageRanks.of(
        {("images", ENCODE): (0, 1), ("video", ""): (1, 2, 4), ("video", ENCODE): (1, 2)}
    )
    assert not stage_ranks([CARD], PoolConfig(num_ranks=6))
    alone = dataclasses.replace(CARD, key="")
    assert stage_ranks([alone], POOL) == StageRanks.of({("", ENCODE): (0, 1)})
    assert not stage_ranks([alone], PoolConfig(num_ranks=2, encoder_ranks=2))


def test_a_worker_loads_the_models_of_its_rank_and_leaves_what_others_lack() -> None:
    def spec(rank: int) -> WorkerSpec:
        missing = cast(Any, None)
        return WorkerSpec(rank=rank, cards=(CARD, VIDEO), pool=POOL, region=missing, store=Path("s"), adapter=None)

    assert [[*spec(rank).held] for rank in range(6)] == [[0], [0, 1], [0, 1], [0], [0, 1], [0]]
    assert [spec(rank).lacks(VIDEO) for rank in (1, 2, 4)] == [frozenset(), frozenset(), {ENCODE}]
    assert [spec(rank).gives(VIDEO) for rank in (1, 2, 4)] == [{ENCODE}, {ENCODE}, frozenset()]
    assert [spec(rank).lacks(CARD) for rank in (0, 2)] == [frozenset(), {ENCODE}]
    assert [rank for rank in range(6) if spec(rank).shows(CARD)] == [0]
    assert [rank for rank in (1, 2, 4) if spec(rank).shows(VIDEO)] == [1]


def test_a_model_has_the_pool_of_its_ranks(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    pool = PoolConfig(num_ranks=8, degrees=(1, 2, 3, 4, 8), encoder_ranks=4)
    part = pool_of(VIDEO, pool)
    assert (part.num_ranks, part.degrees, part.encoder_ranks) == (3, (1, 2), 3)
    assert caplog.messages == [
        "degrees 4,8 are not used: a degree is at most the number of ranks that hold video, 3",
        "degrees 3 are not used: a degree must divide the 8 attention heads of video",
    ]
    caplog.clear()
    whole = pool_of(CARD, PoolConfig(num_ranks=8))
    assert (whole, caplog.messages) == (PoolConfig(num_ranks=8), [])
    # What was measured on so many ranks, in whichever pool, is known of the model.
    one = dataclasses.replace(CARD, ranks=())
    assert hardware_name(part) == hardware_name(PoolConfig(num_ranks=3))
    assert cached_profile_path(VIDEO, part) == cached_profile_path(one, PoolConfig(num_ranks=3, degrees=(1, 2)))


async def measured_on(card: ModelCard, pool: PoolConfig) -> tuple[Profile, list[Task]]:
    tasks: list[Task] = []

    def took(shape: Shape, task: Task, go: int) -> tuple[float, float | None]:
        tasks.append(task)
        return quiet_s(task), quiet_s(task)

    executor = MeasuredExecutor(took, num_ranks=pool.num_ranks)
    profile = await measure(executor, card, pool, card.sizes, lambda done, total, text: None, share=0.0)
    cost = ProfileCost(profile, lambda shape: card.valid_degrees(pool.degrees))
    await warm_up(executor, card, pool, cost, card.sizes, lambda done, total, text: None)
    return profile, tasks


async def test_a_model_is_measured_and_warmed_on_its_ranks_alone() -> None:
    card = dataclasses.replace(VIDEO, ranks=(1, 4))
    profile, tasks = await measured_on(card, pool_of(card, PoolConfig(num_ranks=6, degrees=(1, 2), encoder_ranks=1)))
    assert profile.degrees == (1, 2)
    assert {task.ranks for task in tasks if task.stage == DENOISE} == {(1,), (4,), (1, 4)}
    assert {task.ranks for task in tasks if task.stage == DECODE} == {(1,), (4,)}
    assert {task.ranks for task in tasks if task.stage == ENCODE} == {(1,)}


def test_memory_is_told_by_model() -> None:
    both = (Component("vae", 5, "images"), Component("vae", 7, "video"))
    memory = {0: RankMemory(both[:1], 10), 1: RankMemory(both, 20), 2: RankMemory(both, 30)}
    (images,), (video,) = (held_alike(held_of(memory, key)) for key in ("images", "video"))
    assert (images.ranks, images.num_bytes, images.resident_bytes) == ((0, 1, 2), 5, (10, 20, 30))
    assert (video.ranks, video.num_bytes, video.resident_bytes) == ((1, 2), 7, (20, 30))
    assert [str(held) for held in held_alike(memory)] == [
        "rank 0 holds 5 bytes: images/vae 5 bytes",
        "ranks 1,2 hold 12 bytes each: images/vae 5 bytes, video/vae 7 bytes",
    ]


def test_weights_are_sized_in_the_served_dtype() -> None:
    card = find_model(None)
    sizes = weight_bytes(card)
    assert set(sizes) == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    half = dataclasses.replace(card, execution=Execution("bfloat16"))
    small = dataclasses.replace(card, execution=Execution("bfloat16", quantization="fp8"))
    assert weight_bytes(half) == {name: num_bytes // 2 for name, num_bytes in sizes.items()}
    assert weight_bytes(small)["transformer"] == sizes["transformer"] // 4
    headers = 400_000
    on_disk = sum(file.stat().st_size for file in card.path.rglob("*.safetensors"))
    assert on_disk - headers < sum(weight_bytes(half).values()) < on_disk, "the files are of half precision"


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver's tool that tells of two GPUs of 64 MiB."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$*" in *memory.total*) printf "GPU-a, 64\\nGPU-b, 64\\n";; *) exit 1;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_models_that_a_gpu_cannot_hold_together_are_refused_before_workers_start(gpus: None) -> None:
    card = find_model(None)
    num_mb = sum(weight_bytes(card).values()) / 1e6
    assert 34 < num_mb < 67, "two of them are more than 67 MB, and one is not"
    models = [dataclasses.replace(card, key=name, name=name) for name in ("a", "b")]
    pool = PoolConfig(num_ranks=2, device="cuda")
    with pytest.raises(ConfigError) as caught:
        check_memory(models, pool)
    line = str(caught.value)
    assert line == (
        f"rank 0 would hold {2 * num_mb:.1f} MB of weights (a {num_mb:.1f} MB, b {num_mb:.1f} MB) on a GPU of 67.1 MB; "
        "give models ranks of their own with --model-ranks"
    )
    check_memory([dataclasses.replace(models[0], ranks=(0,)), dataclasses.replace(models[1], ranks=(1,))], pool)
    check_memory(models[:1], pool)
    with pytest.raises(
        ConfigError, match="^ranks 0 to 1 together would hold .*; serve it without text encoders on some"
    ):
        check_memory(models[:1], PoolConfig(num_ranks=2, device="cuda", ranks_per_gpu=2))


def test_more_weights_than_this_machine_has_memory_for_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card = find_model(None)
    check_memory([card], PoolConfig())
    assert caplog.messages == []
    monkeypatch.setattr("tetriserve.profiler.memory.host_bytes", lambda: 10_000_000)
    with caplog.at_level(logging.WARNING):
        check_memory([card], PoolConfig())
    (line,) = caplog.messages
    assert line.endswith("and this machine has 10.0 MB of memory; serve fewer models, or smaller ones")


def test_each_model_has_a_key_and_its_name_where_there_are_several(tmp_path: Path) -> None:
    models = (ModelConfig(name="a", served_model_names=("tiny",), ranks=(1,)), ModelConfig(name="b"))
    first, second = find_cards(EngineConfig(models=models))
    assert [(card.key, card.name, card.aliases, card.ranks) for card in (first, second)] == [
        ("a", "a", ("tiny",), (1,)), ("b", "b", (), ())
    ]  # fmt: skip
    (one,) = find_cards(EngineConfig(models=(ModelConfig(name="a", served_model_names=("tiny",)),)))
    assert (one.key, one.name, one.aliases) == ("", "a", ("tiny",))
    (unnamed,) = find_cards(EngineConfig(models=(ModelConfig(served_model_names=("tiny", "small")),)))
    assert (unnamed.key, unnamed.name, unnamed.aliases) == ("", "tiny", ("small",))
    (own,) = find_cards(EngineConfig())
    assert own == find_model(None)


def test_names_that_two_models_share_are_refused() -> None:
    models = (ModelConfig(name="a", served_model_names=("tiny",)), ModelConfig(name="tiny"))
    with pytest.raises(ConfigError, match="^'tiny' is the name of two models or LoRAs; give each a name of its own$"):
        find_cards(EngineConfig(models=models))
