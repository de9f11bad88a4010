"""What the engine costs over the bare model: ratios and times measured in one run (no GPU needed).

Prints denoise time through the engine over a bare diffusers loop of the same model and steps, on one rank; and the
memory of each extra worker over the model's own. What exchanges and switches of degree cost: benchmarks/teams.py.

    python benchmarks/execution.py [--pairs 45]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

from tetriserve.config import EngineConfig, PoolConfig, SchedulingConfig
from tetriserve.core.request import Shape
from tetriserve.core.stages import DENOISE
from tetriserve.engine import Generation
from tetriserve.executor.local import LocalExecutor
from tetriserve.executor.processes import ProcessStarter
from tetriserve.launch import StartProgress, find_model, launch
from tetriserve.models.checkpoint import read_card

NUM_STEPS = 20
BARS = {Shape(256, 256): 1.05, Shape(512, 512): 1.02}
QUIET = StartProgress(step=lambda text: None)


def bare_loop(directory: Path, connection: Connection) -> None:
    """A process that runs the plain diffusers denoise loop whenever it is sent a size, and answers in seconds."""
    import numpy as np
    import torch
    from diffusers import FluxPipeline
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    pipeline = FluxPipeline.from_pretrained(str(directory), dtype=torch.float32)
    channels = pipeline.transformer.config.in_channels // 4
    while True:
        try:
            size = connection.recv()
        except EOFError:
            return
        with torch.no_grad():
            embeds, pooled, text_ids = pipeline.encode_prompt("a bare loop", max_sequence_length=64)
            generator = torch.Generator("cpu").manual_seed(0)
            started_at = time.perf_counter()
            latents, image_ids = pipeline.prepare_latents(
                1, channels, size, size, torch.float32, torch.device("cpu"), generator
            )
            shift = calculate_shift(latents.shape[1])
            sigmas = np.linspace(1.0, 1 / NUM_STEPS, NUM_STEPS)
            timesteps, _ = retrieve_timesteps(pipeline.scheduler, NUM_STEPS, "cpu", sigmas=sigmas, mu=shift)
            for timestep in timesteps:
                velocity = pipeline.transformer(
                    hidden_states=latents, timestep=timestep.expand(1) / 1000, pooled_projections=pooled,
                    encoder_hidden_states=embeds, txt_ids=text_ids, img_ids=image_ids, return_dict=False,
                )[0]  # fmt: skip
                latents = pipeline.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            connection.send(time.perf_counter() - started_at)


async def overhead(directory: Path, policy: str, num_pairs: int) -> dict[Shape, list[float]]:
    """Ratios of denoise time through the engine over the bare loop, taken in turn so that drift hits both."""
    pool = PoolConfig(num_ranks=1)
    ours, theirs = multiprocessing.Pipe()
    starter = ProcessStarter([find_model(None)], pool)
    process = starter.context.Process(target=bare_loop, args=(directory, theirs), daemon=True)  # type: ignore[attr-defined]
    await starter.start(process)
    engine = (await launch(EngineConfig(pool=pool, scheduling=SchedulingConfig(policy=policy)), QUIET)).engine
    ratios: dict[Shape, list[float]] = {shape: [] for shape in BARS}
    try:

        async def bare(shape: Shape) -> float:
            ours.send(shape.height)
            return await asyncio.to_thread(ours.recv)

        async def through_engine(shape: Shape) -> float:
            generated = await engine.generate(
                Generation(prompt="an engine", size=str(shape), num_steps=NUM_STEPS, slo_s=600.0)
            )
            runs = [run for run in generated.outcome.runs if run.task.stage == DENOISE]
            return runs[-1].end_s - runs[0].start_s

        for pair in range(-2, num_pairs):  # two rounds of warm-up
            for shape in BARS:
                if pair % 2:  # neither always goes first
                    bare_s, engine_s = await bare(shape), await through_engine(shape)
                else:
                    engine_s, bare_s = await through_engine(shape), await bare(shape)
                if pair >= 0:
                    ratios[shape].append(engine_s / bare_s)
    finally:
        await engine.stop()
        ours.close()
        await starter.reap()
    return ratios


async def worker_memory(directory: Path) -> tuple[float, float]:
    """MiB that each worker holds alone (PSS, shared pages divided), and MiB of the model's weights."""
    executor = LocalExecutor([read_card(directory)], PoolConfig(num_ranks=3))
    await executor.start(lambda text: None)
    try:
        pss = [_pss_mib(pid) for pid in executor.pids.values()]
    finally:
        await executor.stop()
    stored = sum(path.stat().st_size for path in directory.rglob("*.safetensors"))
    return statistics.fmean(pss), 2 * stored / 2**20  # stored in half precision, computed with in single


def _pss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=45, help="engine and bare loop, in turn, per size")
    parser.add_argument("--policy", default="tetriserve")
    arguments = parser.parse_args()
    directory = find_model(None).path
    for shape, ratios in asyncio.run(overhead(directory, arguments.policy, arguments.pairs)).items():
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"denoise through the engine over a bare loop, {arguments.policy} {shape}: median {middle:.3f}x "
            f"(quartiles {low:.3f} and {high:.3f}, {len(ratios)} pairs; bar {BARS[shape]:.2f}x)"
        )
    pss, weights = asyncio.run(worker_memory(directory))
    print(
        f"memory per worker: {pss:.0f} MiB, {pss - weights:.0f} MiB over the model's own {weights:.0f} MiB of weights"
    )


if __name__ == "__main__":
    main()
