"""What is checked before any worker starts: profiles against models, degrees against sizes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from tetriserve.config import EngineConfig, PoolConfig
from tetriserve.core.errors import CheckpointError, ConfigError, ProfileError
from tetriserve.core.request import Shape
from tetriserve.launch import (
    Progress,
    cached_profile_path,
    check_profile,
    find_model,
    find_profile,
    measure_profile,
    with_usable_degrees,
)
from tetriserve.models.card import ModelCard
from tetriserve.profile import DecodeRow, DenoiseRow, Profile, save_profile
from tetriserve.profiler import hardware_name

CARD = ModelCard(
    name="tiny", path=Path("/models/tiny"), pipeline_class="FluxPipeline", dtype="float32", size_multiple=32,
    pixels_per_token=32, num_heads=8, num_text_tokens=64, default_num_steps=20, default_guidance_scale=3.5,
    has_guidance=True, has_negative_prompt=True, sizes=(Shape(256, 256), Shape(512, 512)), fingerprint="abc",
)  # fmt: skip
PROFILE = Profile(
    model="tiny", fingerprint="abc", hardware="h", dtype="float32", source="s", created="c", encode_s=0.5,
    switch_s=0.001,
    denoise=tuple(
        DenoiseRow(height=side, width=side, tokens=side * side // 1024, degree=degree, step_s=0.1)
        for side in (256, 512)
        for degree in (1, 2)
    ),
    decode=(DecodeRow(height=256, width=256, decode_s=0.2), DecodeRow(height=512, width=512, decode_s=0.8)),
)  # fmt: skip


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


def test_a_degree_that_no_size_can_use_needs_no_row() -> None:
    three_heads = dataclasses.replace(CARD, num_heads=6)
    assert check_profile(PROFILE, "p.json", three_heads, PoolConfig(num_ranks=4)) is PROFILE


def test_a_named_profile_is_loaded_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    config = EngineConfig(profile=str(path), pool=PoolConfig(num_ranks=2))
    with pytest.raises(ProfileError, match="cannot be read"):
        find_profile(config, CARD)
    save_profile(PROFILE, path)
    assert find_profile(config, CARD) == PROFILE
    save_profile(dataclasses.replace(PROFILE, fingerprint="xyz"), path)
    with pytest.raises(ProfileError, match=re.escape(str(path))):
        find_profile(config, CARD)


def test_a_kept_profile_is_used_until_the_model_has_a_size_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = EngineConfig(pool=PoolConfig(num_ranks=2))
    kept = dataclasses.replace(PROFILE, hardware=hardware_name(config.pool))
    assert find_profile(config, CARD) is None
    save_profile(kept, cached_profile_path(CARD, config.pool))
    assert find_profile(config, CARD) == kept
    larger = dataclasses.replace(CARD, sizes=(*CARD.sizes, Shape(1024, 1024)))
    assert find_profile(config, larger) is None


def test_degrees_that_no_size_can_use_are_dropped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    pool = PoolConfig(num_ranks=6, degrees=(1, 2, 3, 4, 6))
    assert with_usable_degrees(CARD, pool).degrees == (1, 2, 4)
    (record,) = caplog.records
    assert record.getMessage().startswith("degrees 3,6 are not used: no size of tiny can run at them (a degree must")
    assert with_usable_degrees(CARD, PoolConfig(num_ranks=2)).degrees == (1, 2)
    assert len(caplog.records) == 1


def test_another_text_length_is_another_profile(bundled: ModelCard) -> None:
    longer = find_model(None, 64)
    assert (bundled.num_text_tokens, longer.num_text_tokens) == (40, 64)
    assert cached_profile_path(bundled, PoolConfig()) != cached_profile_path(longer, PoolConfig())
    assert find_model(None, 40) == bundled
    for length in (0, 513):
        with pytest.raises(ConfigError, match=f"max-sequence-length is {length}; allowed: 1 to 512"):
            find_model(None, length)


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'no'} is not a directory")):
        find_model(str(tmp_path / "no"))


async def test_gpus_that_are_not_there_are_refused_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi there
    with pytest.raises(ConfigError, match="nvidia-smi finds no GPU on this machine; use --device cpu"):
        await measure_profile(str(tmp_path / "no"), PoolConfig(device="cuda"), (), Progress())
