"""Profiles that are bundled for simulation are never taken for a live model by mistake."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import derive_profiles
from tetriserve import profiles
from tetriserve.config import PoolConfig
from tetriserve.core.execution import Execution
from tetriserve.core.request import Shape
from tetriserve.models.card import ModelCard
from tetriserve.profile.bundled import bundled_profiles, open_profile

CARD = ModelCard(
    name="FLUX.1-dev", path=Path("/models/flux"), family="flux", pipeline_class="FluxPipeline",
    execution=Execution("bfloat16"), size_multiple=16,
    pixels_per_token=16, num_heads=24, num_text_tokens=512, default_num_steps=28, default_guidance_scale=3.5,
    has_guidance=True, has_negative_prompt=True, sizes=(Shape(256, 256), Shape(1024, 1024)), fingerprint="abc",
)  # fmt: skip


@pytest.mark.parametrize("name", ["flux.1-dev-8xh100", "qwen-image-4xh20"])
def test_figures_that_were_not_measured_on_this_machine_do_not_plan_for_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = open_profile(name)
    monkeypatch.setattr(profiles, "hardware_name", lambda pool: profile.hardware)  # even on hardware of that name
    monkeypatch.setattr(profiles, "cache_directory", lambda: tmp_path)
    card = dataclasses.replace(CARD, name=profile.model)
    pool = PoolConfig(num_ranks=profile.degrees[-1], degrees=profile.degrees)
    assert profiles.find_profile(card, pool) is None


def test_a_new_set_of_ranks_costs_what_an_nccl_group_does_on_gpus_and_nothing_on_processors() -> None:
    team_s = {name: open_profile(name).team_s for name in bundled_profiles()}
    assert team_s == {name: 0.0 if "cores" in name else 0.778 for name in bundled_profiles()}


def test_the_derived_profiles_are_what_their_script_writes() -> None:
    for model in derive_profiles.MODELS:
        assert derive_profiles.is_saved(derive_profiles.derive(model), derive_profiles.DATA / f"{model.file}.json")


def test_a_derived_pass_at_eight_ranks_is_the_one_that_was_published() -> None:
    """Morphic's 40 steps of two passes in 195.13 s, of which short stages take 7.5 s, for 12.62 s a pass on one GPU."""
    wan = derive_profiles.WAN_14B
    rest = derive_profiles.rest_of(wan, wan.measured)
    passes_s = 80 * derive_profiles.amdahl_s(derive_profiles.ONE_GPU_3_PASSES_S / 3, rest, 8)
    assert passes_s + derive_profiles.SHORT_STAGES_S == pytest.approx(195.13)


@pytest.mark.parametrize(("name", "default"), [("wan2.1-14b", "1280x720x81"), ("wan2.2-ti2v-5b", "1280x704x121")])
def test_a_derived_video_profile_has_every_stage_at_every_degree(name: str, default: str) -> None:
    profile = open_profile(f"{name}-8xh100")
    assert profile.frame_step == 4
    assert profile.degrees == (1, 2, 4, 8)
    assert str(profile.shapes[-1]) == default
    for stage in ("denoise", "decode"):
        for shape in profile.shapes:
            rows = [row for row in profile.rows_of(stage) if row.shape == shape]
            assert [row.degree for row in rows] == [1, 2, 4, 8]
            seconds = [row.seconds for row in rows]
            assert seconds == sorted(seconds, reverse=True)
            ranks_s = [row.degree * row.seconds for row in rows]
            assert ranks_s == sorted(ranks_s)
    assert "DERIVED" in profile.source
    assert "ONE pass" in profile.source
