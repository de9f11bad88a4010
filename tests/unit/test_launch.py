"""What is checked before any worker starts: profiles against models, degrees against sizes."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import pytest

from tests.unit.measured_executor import MeasuredExecutor, quiet_s
from tetriserve.config import PoolConfig
from tetriserve.control.controller import Controller
from tetriserve.control.foresight import Foresight
from tetriserve.core.errors import CheckpointError, ConfigError, ProfileError
from tetriserve.core.execution import Execution
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, ENCODE_IMAGE
from tetriserve.engine import LiveEngine
from tetriserve.engine.intake import Generation, Intake
from tetriserve.launch import StartProgress, find_model, measure_profile
from tetriserve.models.card import ModelCard
from tetriserve.models.ranks import pool_of
from tetriserve.models.tiles import Tiles
from tetriserve.policies.registry import make_policy
from tetriserve.profile import Profile, ProfileCost, Row, load_profile, save_profile
from tetriserve.profile.corrections import Corrections
from tetriserve.profiler import hardware_name
from tetriserve.profiles import (
    cached_profile_path,
    check_profile,
    corrections_path,
    find_corrections,
    find_profile,
    keep_corrections,
    measure_and_keep,
)

CARD = ModelCard(
    name="tiny", path=Path("/models/tiny"), family="flux", pipeline_class="FluxPipeline",
    execution=Execution("float32"), size_multiple=32,
    pixels_per_token=32, num_heads=8, num_text_tokens=64, default_num_steps=20, default_guidance_scale=3.5,
    has_guidance=True, has_negative_prompt=True, sizes=(Shape(256, 256), Shape(512, 512)), fingerprint="abc",
)  # fmt: skip
PROFILE = Profile(
    max_batch=8,
    model="tiny",
    fingerprint="abc",
    hardware="h",
    execution=Execution("float32"),
    source="s",
    created="c",
    switch_s=0.001,
    rows=(
        Row(stage=ENCODE, seconds=0.5),
        *(
            Row(stage=DENOISE, height=side, width=side, tokens=side * side // 1024, degree=degree, seconds=0.1)
            for side in (256, 512)
            for degree in (1, 2)
        ),
        Row(stage=DECODE, height=256, width=256, seconds=0.2),
        Row(stage=DECODE, height=512, width=512, seconds=0.8),
    ),
)


@pytest.fixture
def bundled() -> ModelCard:
    return find_model(None)


def test_a_profile_of_this_model_with_all_degrees_is_taken_as_it_is() -> None:
    assert check_profile(PROFILE, "p.json", CARD, PoolConfig(num_ranks=2)) is PROFILE


def test_a_profile_without_a_fingerprint_serves_any_model() -> None:
    anyones = dataclasses.replace(PROFILE, fingerprint="", model="other")
    assert check_profile(anyones, "p.json", CARD, PoolConfig(num_ranks=2)) is anyones


def test_another_models_profile_is_refused() -> None:
    others = dataclasses.replace(PROFILE, fingerprint="xyz", model="big")
    message = "profile p.json is for model 'big' (xyz), not for 'tiny' (abc); measure one with: tetriserve profile"
    with pytest.raises(ProfileError, match=re.escape(message)):
        check_profile(others, "p.json", CARD, PoolConfig(num_ranks=2))


def test_a_profile_that_lacks_a_degree_is_refused_with_both_ways_out() -> None:
    message = (
        "profile p.json has no row for 256x256 at degree 4; measure one with --degrees 1,2,4, or serve with "
        "--degrees 1,2"
    )
    with pytest.raises(ProfileError, match=re.escape(message)):
        check_profile(PROFILE, "p.json", CARD, PoolConfig(num_ranks=4))
    assert check_profile(PROFILE, "p.json", CARD, PoolConfig(num_ranks=4, degrees=(1, 2))) is PROFILE


def test_a_degree_that_the_model_cannot_use_needs_no_row() -> None:
    three_heads = dataclasses.replace(CARD, num_heads=6)
    assert check_profile(PROFILE, "p.json", three_heads, PoolConfig(num_ranks=4)) is PROFILE


def test_a_named_profile_is_loaded_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    pool = PoolConfig(num_ranks=2)
    with pytest.raises(ProfileError, match="cannot be read"):
        find_profile(CARD, pool, str(path))
    save_profile(PROFILE, path)
    assert find_profile(CARD, pool, str(path)) == PROFILE
    save_profile(dataclasses.replace(PROFILE, fingerprint="xyz"), path)
    with pytest.raises(ProfileError, match=re.escape(str(path))):
        find_profile(CARD, pool, str(path))


def test_a_kept_profile_is_used_until_the_model_has_a_size_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pool = PoolConfig(num_ranks=2)
    kept = dataclasses.replace(PROFILE, hardware=hardware_name(pool))
    assert find_profile(CARD, pool) is None
    save_profile(kept, cached_profile_path(CARD, pool))
    assert find_profile(CARD, pool) == kept
    larger = dataclasses.replace(CARD, sizes=(*CARD.sizes, Shape(1024, 1024)))
    assert find_profile(larger, pool) is None


def test_a_kept_profile_is_not_used_where_larger_batches_are_allowed_than_it_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pools = [PoolConfig(num_ranks=2, max_batch=max_batch) for max_batch in (4, 8, 16)]
    save_profile(dataclasses.replace(PROFILE, hardware=hardware_name(pools[0])), cached_profile_path(CARD, pools[0]))
    found = [find_profile(CARD, pool) is not None for pool in pools]
    assert found == [True, True, False]


def test_a_kept_profile_that_does_not_say_what_groups_of_torch_cost_is_not_used_with_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for collectives, team_s, is_used in (("shm", 0.0, True), ("torch", 0.0, False), ("torch", 0.5, True)):
        pool = PoolConfig(num_ranks=2, collectives=collectives)
        kept = dataclasses.replace(PROFILE, hardware=hardware_name(pool), team_s=team_s)
        save_profile(kept, cached_profile_path(CARD, pool))
        assert find_profile(CARD, pool) == (kept if is_used else None)


def test_a_named_profile_that_does_not_say_what_groups_of_torch_cost_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p.json"
    save_profile(PROFILE, path)
    assert find_profile(CARD, PoolConfig(num_ranks=2, collectives="torch"), str(path)) == PROFILE
    (warning,) = caplog.messages
    assert warning.startswith(f"profile {path} has no team_s")


def test_degrees_that_no_size_can_use_are_dropped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    pool = PoolConfig(num_ranks=6, degrees=(1, 2, 3, 4, 6))
    assert pool_of(CARD, pool).degrees == (1, 2, 4)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "degrees 3,6 are not used: a degree must divide the 8 attention heads of tiny"
    )
    assert pool_of(CARD, PoolConfig(num_ranks=2)).degrees == (1, 2)
    assert len(caplog.records) == 1


def test_another_text_length_is_another_profile(bundled: ModelCard) -> None:
    longer = find_model(None, 64)
    assert (bundled.num_text_tokens, longer.num_text_tokens) == (40, 64)
    assert cached_profile_path(bundled, PoolConfig()) != cached_profile_path(longer, PoolConfig())
    assert find_model(None, 40) == bundled
    for length in (0, 513):
        with pytest.raises(ConfigError, match=f"max-sequence-length is {length}; allowed: 1 to 512"):
            find_model(None, length)


def test_a_kept_profile_in_doubt_is_measured_again_and_a_named_one_is_taken_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pool = PoolConfig(num_ranks=2)
    kept = dataclasses.replace(PROFILE, hardware=hardware_name(pool), doubt="256x256: busy")
    path = cached_profile_path(CARD, pool)
    save_profile(kept, path)
    assert find_profile(CARD, pool) is None
    assert find_profile(CARD, pool, str(path)) == kept
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage() == f"the times of profile {path} may be too long: 256x256: busy"


def test_a_profile_can_be_measured_anew_and_then_goes_before_a_bundled_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tetriserve.profiles.BUNDLED_PROFILES", tmp_path / "bundled")
    pool = PoolConfig(num_ranks=2)
    bundled = dataclasses.replace(PROFILE, hardware=hardware_name(pool))
    save_profile(bundled, tmp_path / "bundled/p.json")
    assert find_profile(CARD, pool) == bundled
    assert find_profile(CARD, pool, remeasure=True) is None
    measured = dataclasses.replace(bundled, switch_s=0.7)
    save_profile(measured, cached_profile_path(CARD, pool))
    assert find_profile(CARD, pool) == measured


def uncounted(done: int, total: int, text: str) -> None: ...


async def test_a_profile_measured_on_a_busy_machine_is_kept_in_doubt_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pool = PoolConfig(num_ranks=1)
    busy = MeasuredExecutor(lambda shape, task, go: (9 * quiet_s(task), 0.01 * quiet_s(task)), num_ranks=1)
    profile = await measure_and_keep(busy, CARD, pool, uncounted)
    assert load_profile(cached_profile_path(CARD, pool)) == profile
    assert profile.doubt
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage() == (
        "the machine was busy while the profile was measured: its times, and default deadlines, may be too long "
        f"({profile.doubt}); the next start measures again, unless --profile names one"
    )
    assert find_profile(CARD, pool) is None
    caplog.clear()
    quiet = MeasuredExecutor(lambda shape, task, go: (quiet_s(task), quiet_s(task)), num_ranks=1)
    profile = await measure_and_keep(quiet, CARD, pool, uncounted)
    assert find_profile(CARD, pool) == profile
    assert [record for record in caplog.records if record.levelno == logging.WARNING] == []


def launched(cost: ProfileCost, pool: PoolConfig) -> LiveEngine:
    executor = MeasuredExecutor(lambda shape, task, go: (2 * quiet_s(task), None), num_ranks=1)
    policy = make_policy("fcfs", cost, num_ranks=1, shapes=cost.profile.shapes)
    engine = LiveEngine(
        Controller(policy, cost),
        executor,
        [Intake(card=CARD, cost=cost)],
        Foresight(lambda: policy),
        max_queue=9,
        policy_name="test",
    )
    keep_corrections(engine, [(CARD, pool)])
    engine.start()
    return engine


async def test_what_an_engine_learnt_is_kept_at_its_stop_and_taken_up_by_the_next_on_the_same_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pool = PoolConfig(num_ranks=1)
    engine = launched(ProfileCost(PROFILE), pool)
    await engine.generate(Generation(prompt="a lighthouse", num_steps=3))
    learnt = engine.controller.cost
    await engine.stop()
    assert isinstance(learnt, ProfileCost)
    assert learnt.corrections != Corrections()
    assert find_corrections(PROFILE, CARD, pool) == learnt.corrections
    assert find_corrections(dataclasses.replace(PROFILE, switch_s=0.6), CARD, pool) == Corrections()  # measured anew
    assert find_corrections(PROFILE, CARD, PoolConfig(num_ranks=2)) == Corrections()
    corrections_path(CARD, pool).write_text("{")
    caplog.clear()
    assert find_corrections(PROFILE, CARD, pool) == Corrections()
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "the profile is corrected anew: corrections " in warning.getMessage()
    await launched(ProfileCost(PROFILE), pool).stop()  # learnt nothing: what is kept stays
    assert corrections_path(CARD, pool).read_text() == "{"


async def test_a_failed_engine_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pool = PoolConfig(num_ranks=1)
    engine = launched(ProfileCost(PROFILE), pool)
    await engine.generate(Generation(prompt="a lighthouse", num_steps=1))
    engine.failure = "the scheduler failed"
    await engine.stop()
    assert not corrections_path(CARD, pool).exists()


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'no'} is not a directory")):
        find_model(str(tmp_path / "no"))


async def test_gpus_that_are_not_there_are_refused_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi there
    with pytest.raises(ConfigError, match="nvidia-smi finds no GPU on this machine; use --device cpu"):
        await measure_profile(str(tmp_path / "no"), PoolConfig(device="cuda"), (), StartProgress())


def test_a_kept_profile_without_times_of_pictures_is_measured_again_for_a_model_that_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pool = PoolConfig()
    kept = dataclasses.replace(PROFILE, hardware=hardware_name(pool))
    save_profile(kept, cached_profile_path(CARD, pool))
    starting = dataclasses.replace(CARD, max_images=1)
    assert (find_profile(CARD, pool), find_profile(starting, pool)) == (kept, None)
    encoding = tuple(
        Row(stage=ENCODE_IMAGE, height=shape.height, width=shape.width, seconds=0.1) for shape in CARD.sizes
    )
    kept = dataclasses.replace(kept, rows=(*kept.rows, *encoding))
    save_profile(kept, cached_profile_path(CARD, pool))
    assert find_profile(starting, pool) == kept


def test_a_kept_profile_without_decodes_at_the_degrees_that_tiles_allow_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pool = PoolConfig(num_ranks=2)
    card = dataclasses.replace(
        CARD, execution=Execution("float32", tiling="vae"), tiles=Tiles(side=32, stride=24, scale=8)
    )
    kept = dataclasses.replace(PROFILE, hardware=hardware_name(pool), execution=card.execution)
    save_profile(kept, cached_profile_path(card, pool))
    assert find_profile(card, pool) is None
    shared = Row(stage=DECODE, height=512, width=512, degree=2, seconds=0.5)
    kept = dataclasses.replace(kept, rows=(*kept.rows, shared))
    save_profile(kept, cached_profile_path(card, pool))
    assert find_profile(card, pool) == kept
    named = tmp_path / "named.json"
    save_profile(dataclasses.replace(kept, rows=kept.rows[:-1]), named)
    assert find_profile(card, pool, str(named)) is not None
