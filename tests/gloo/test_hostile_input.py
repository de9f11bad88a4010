"""What strangers write, through the real tokenizers and the real model; and model directories that mean harm."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.hostile import PROMPTS
from tetriserve.config import EngineConfig, ModelConfig, PoolConfig
from tetriserve.core.errors import CheckpointError
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.engine import Generation
from tetriserve.launch import StartProgress, launch
from tetriserve.models.checkpoint import read_card
from tetriserve.models.flux.adapter import FluxAdapter


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_any_text_is_encoded(reference: FluxAdapter, prompt: str) -> None:
    request = Request(
        request_id="r",
        prompt=prompt,
        negative_prompt=prompt,
        true_cfg_scale=4.0,
        shape=Shape(64, 64),
        stages=image_stages(1, 2),
        seed=0,
        arrival_s=0.0,
        deadline_s=0.0,
    )
    embeds = reference.encode(request)
    assert {name.startswith("negative_") for name in embeds} == {True, False}
    assert all(torch.isfinite(tensor).all() for tensor in embeds.values())


async def test_hostile_text_becomes_a_picture_and_costs_no_worker(profile_path: str) -> None:
    config = EngineConfig(models=(ModelConfig(profile=profile_path),), pool=PoolConfig(num_ranks=2))
    engine = (await launch(config, StartProgress(step=lambda text: None))).engine
    try:
        pids = engine._executor.pids  # type: ignore[attr-defined]
        for prompt in ("".join(PROMPTS.values())[:8000], PROMPTS["as long as it may be, four bytes each"]):
            image = await engine.generate(Generation(prompt=prompt, size="256x256", num_steps=1, seed=1, slo_s=600))
            assert image.pixels.shape == (256, 256, 3)
        assert engine._executor.pids == pids  # type: ignore[attr-defined]
    finally:
        await engine.stop()


def test_sizes_at_the_ends_of_what_the_model_divides(reference: FluxAdapter) -> None:
    for height, width in ((32, 32), (32, 512), (512, 32), (32, 64)):
        request = Request(
            request_id="r",
            prompt="a",
            shape=Shape(height, width),
            stages=image_stages(1),
            seed=0,
            arrival_s=0.0,
            deadline_s=0.0,
        )
        latents = reference.denoise_loop(request, reference.encode(request), 0).step(reference.initial_latents(request))
        assert reference.decode(request, latents).shape == (height, width, 3)


class Harm:
    """A pickle that would touch `mark`."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self._mark,)


def test_loading_a_model_unpickles_nothing_and_runs_none_of_its_files(
    bundled_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickles and Python lie beside every part; safetensors alone are read."""
    model, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(bundled_dir, model)
    for part in [model, *(path for path in model.iterdir() if path.is_dir())]:
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json"):
            (part / name).write_bytes(pickle.dumps(Harm(mark)))
        for name in ("pipeline.py", "__init__.py", "modeling.py", "sitecustomize.py"):
            (part / name).write_text(f"open({str(mark)!r}, 'w')")

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    adapter = FluxAdapter(read_card(model), "cpu")
    monkeypatch.undo()
    request = Request(
        request_id="r", prompt="a", shape=Shape(64, 64), stages=image_stages(1), seed=0, arrival_s=0.0, deadline_s=0.0
    )
    assert np.isfinite(next(iter(adapter.encode(request).values())).numpy()).all()
    assert not mark.exists()


def test_weights_that_are_pickles_by_another_name_are_refused(bundled_dir: Path, tmp_path: Path) -> None:
    model, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(bundled_dir, model)
    (model / "vae/diffusion_pytorch_model.safetensors").write_bytes(pickle.dumps(Harm(mark)))
    with pytest.raises(CheckpointError, match="is truncated or not a safetensors file"):
        read_card(model)
    assert not mark.exists()
