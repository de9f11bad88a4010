"""Profiles that are bundled for simulation are never taken for a live model by mistake."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tetriserve import launch
from tetriserve.config import EngineConfig, PoolConfig
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
    monkeypatch.setattr(launch, "hardware_name", lambda pool: profile.hardware)  # even on hardware of that name
    monkeypatch.setattr(launch, "cache_directory", lambda: tmp_path)
    card = dataclasses.replace(CARD, name=profile.model)
    pool = PoolConfig(num_ranks=profile.degrees[-1], degrees=profile.degrees)
    assert launch.find_profile(EngineConfig(pool=pool), card) is None


def test_a_new_set_of_ranks_costs_what_an_nccl_group_does_on_gpus_and_nothing_on_processors() -> None:
    team_s = {name: open_profile(name).team_s for name in bundled_profiles()}
    assert team_s == {name: 0.0 if "cores" in name else 0.778 for name in bundled_profiles()}
