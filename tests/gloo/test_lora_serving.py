"""LoRAs on the bundled model as it is served: two adapters take turns on two ranks, and a worker dies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tests.families.loras import ATTENTION, write_lora
from tests.waiting import HANG_S, until
from tetriserve.config import EngineConfig, LoraConfig, ModelConfig, PoolConfig
from tetriserve.core.errors import CheckpointError, InvalidRequest
from tetriserve.core.request import Lora
from tetriserve.engine import GeneratedImage, Generation
from tetriserve.engine.live import LiveEngine
from tetriserve.executor.local import LocalExecutor
from tetriserve.launch import BUNDLED_MODEL, StartProgress, launch
from tetriserve.models.checkpoint import read_card
from tetriserve.models.diffusion import DiffusionAdapter
from tetriserve.models.lora import with_loras
from tetriserve.models.registry import load_adapter
from tetriserve.workload.outcome import Status

PIXEL_TOLERANCE = 1
NUM_STEPS = 8
LORAS = (None, Lora("sketch"), Lora("neon", 0.5), Lora("sketch", 0.5))


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoraConfig, ...]:
    path = tmp_path_factory.mktemp("loras")

    def made(name: str, seed: int, targets: dict[str, Iterable[str]]) -> LoraConfig:
        pipeline = diffusers.FluxPipeline.from_pretrained(BUNDLED_MODEL)
        file = write_lora(
            path / name, pipeline, {key: tuple(ends) for key, ends in targets.items()}, seed=seed, alpha=1
        )
        return LoraConfig(name, str(file))

    return (
        made("sketch", 1, {"transformer": ATTENTION, "text_encoder": ("q_proj", "v_proj")}),
        made("neon", 2, {"transformer": ("proj_mlp", "to_v")}),
    )


@pytest.fixture(scope="module")
def alone(configs: tuple[LoraConfig, ...]) -> dict[Lora | None, np.ndarray]:
    """What one process draws with each adapter at degree 1."""
    card = with_loras(read_card(BUNDLED_MODEL), configs)
    adapter: Any = load_adapter(card, "cpu")
    assert isinstance(adapter, DiffusionAdapter)
    pipeline, pictures = adapter.pipeline, {}
    for lora in LORAS:
        adapter._adapters.activate(lora)
        [picture] = pipeline(
            "a red circle", height=256, width=256, num_inference_steps=NUM_STEPS, output_type="np",
            max_sequence_length=card.num_text_tokens, guidance_scale=card.default_guidance_scale,
            generator=torch.Generator("cpu").manual_seed(7),
        ).images  # fmt: skip
        pictures[lora] = (picture * 255).round().astype(int)
    return pictures


def wanted(lora: Lora | None, **fields: Any) -> Generation:
    return Generation(prompt="a red circle", size="256x256", num_steps=NUM_STEPS, seed=7, lora=lora, **fields)


async def generate(engine: LiveEngine, *generations: Generation) -> list[GeneratedImage]:
    return list(await asyncio.gather(*(engine.generate(each) for each in generations)))


async def test_adapters_take_turns_on_ranks_of_which_one_is_killed(
    configs: tuple[LoraConfig, ...], alone: dict[Lora | None, np.ndarray], profile_path: str
) -> None:
    config = EngineConfig(
        models=(ModelConfig(profile=profile_path, loras=configs),),
        pool=PoolConfig(num_ranks=2, heartbeat_timeout_s=HANG_S),
    )
    engine = (await launch(config, StartProgress())).engine
    executor = engine._executor
    assert isinstance(executor, LocalExecutor)
    try:
        assert 0 < engine.controller.cost.lora_s < 1
        order = [lora for _ in range(3) for lora in LORAS]
        drawing = asyncio.create_task(generate(engine, *(wanted(lora) for lora in order)))
        await until(lambda: any(0 < one.stage_steps_done < NUM_STEPS for one in engine.state.trajectories))
        pid = executor._workers[0].process.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        images = await drawing
        for lora, image in zip(order, images, strict=True):
            assert image.outcome.status is Status.FINISHED
            assert np.abs(image.pixels.astype(int) - alone[lora]).max() <= PIXEL_TOLERANCE, lora
        assert executor.num_restarts == 1
        await until(lambda: len(engine.state.ranks) == 2)
        for degree in (1, 2):
            for lora in LORAS:
                [image] = await generate(engine, wanted(lora, degrees=(degree,)))
                difference = np.abs(image.pixels.astype(int) - alone[lora]).max()
                assert difference <= (0 if degree == 1 else PIXEL_TOLERANCE), (degree, lora)
        with pytest.raises(InvalidRequest, match="lora 'photo' is not served; served: sketch, neon"):
            await engine.generate(wanted(Lora("photo")))
    finally:
        await engine.stop()
    for lora in LORAS[1:]:
        assert np.abs(alone[lora] - alone[None]).max() > 2, "an adapter that changes nothing shows nothing"


def test_what_the_loader_refuses_ends_the_start_in_one_line(configs: tuple[LoraConfig, ...], tmp_path: Path) -> None:
    spoilt = tmp_path / "cut.safetensors"
    spoilt.write_bytes(Path(configs[0].path).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut.safetensors is truncated"):
        asyncio.run(launch(EngineConfig(models=(ModelConfig(loras=(LoraConfig("a", str(spoilt)),)),)), StartProgress()))
