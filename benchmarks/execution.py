"""What the engine costs over the bare model: ratios and times measured in one run (no GPU needed).

Prints denoise time through the engine over a bare diffusers loop of the same model and steps, on one rank; the time of
a degree switch with a warm group; and the memory of each extra worker over the model's own.

    python benchmarks/execution.py [--pairs 9]
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
from tetriserve.core.events import Event, StartTask, TaskFinished
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.trajectory import Stage
from tetriserve.engine import Generation
from tetriserve.executor.local import LocalExecutor
from tetriserve.executor.processes import start_context, start_process
from tetriserve.launch import Progress, find_model, launch

NUM_STEPS = 20
BARS = {Shape(256, 256): 1.05, Shape(512, 512): 1.02}
SWITCH_BAR_S = 0.005
QUIET = Progress(step=lambda text: None)


def bare_loop(directory: Path, connection: Connection) -> None:
    """A process that runs the plain diffusers denoise loop whenever it is sent a size, and answers in seconds."""
    import torch
    from diffusers import FluxPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    pipeline = FluxPipeline.from_pretrained(str(directory), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    while True:
        try:
            size = connection.recv()
        except EOFError:
            return
        marks: list[float] = []

        def mark(pipe: object, step: int, timestep: object, tensors: dict[str, object], marks=marks) -> dict:
            marks.append(time.perf_counter())
            return {}

        pipeline(
            "a bare loop", height=size, width=size, num_inference_steps=NUM_STEPS + 1, max_sequence_length=64,
            generator=torch.Generator("cpu").manual_seed(0), output_type="latent", callback_on_step_end=mark,
        )  # fmt: skip
        connection.send(marks[-1] - marks[0])  # NUM_STEPS whole steps, the first one left out


async def overhead(directory: Path, policy: str, num_pairs: int) -> dict[Shape, list[float]]:
    """Ratios of denoise time through the engine over the bare loop, taken in turn so that drift hits both."""
    pool = PoolConfig(num_ranks=1)
    ours, theirs = multiprocessing.Pipe()
    process = start_context(pool).Process(target=bare_loop, args=(directory, theirs), daemon=True)
    start_process(process, pool)
    engine = await launch(EngineConfig(pool=pool, scheduling=SchedulingConfig(policy=policy)), QUIET)
    ratios: dict[Shape, list[float]] = {shape: [] for shape in BARS}
    try:
        for pair in range(-2, num_pairs):  # two rounds of warm-up
            for shape in BARS:
                ours.send(shape.height)
                bare_s = await asyncio.to_thread(ours.recv)
                generated = await engine.generate(
                    Generation(prompt="an engine", size=str(shape), num_steps=NUM_STEPS, slo_s=600.0)
                )
                runs = [run for run in generated.outcome.runs if run.task.stage is Stage.DENOISE]
                if pair >= 0:
                    ratios[shape].append((runs[-1].end_s - runs[0].start_s) / bare_s)
    finally:
        await engine.stop()
        ours.close()
        process.join(5)
    return ratios


async def switch_times(directory: Path) -> tuple[list[float], list[float]]:
    """Seconds, per degree 1 and 2: what a one-step task costs more right after a task of the other degree.

    And the seconds of such a task when the one before it had the same degree. All groups are warm.
    """
    from tetriserve.models.card import read_card

    executor = LocalExecutor(read_card(directory), PoolConfig(num_ranks=2))
    await executor.start(lambda text: None)
    finished: asyncio.Queue[Event] = asyncio.Queue()
    executor.subscribe(finished.put_nowait)
    request = Request(
        request_id="switch", prompt="x", shape=Shape(256, 256), num_steps=1000, seed=0, arrival_s=0.0, deadline_s=0.0
    )
    embeds = latents = None
    stay: dict[int, list[float]] = {1: [], 2: []}
    switch: dict[int, list[float]] = {1: [], 2: []}
    degrees = [1, 1, 2, 2] * 60
    try:
        for task_id, degree in enumerate([0, *degrees]):
            stage = Stage.DENOISE if degree else Stage.ENCODE
            task = Task("switch", stage, tuple(range(max(degree, 1))), 1 if degree else 0)
            started_at = time.perf_counter()
            executor.start_task(StartTask(task_id, task, request, max(task_id - 1, 0), embeds, latents))
            event = await finished.get()
            elapsed = time.perf_counter() - started_at
            assert isinstance(event, TaskFinished), event
            if stage is Stage.ENCODE:
                embeds = event.result
                continue
            latents = event.result
            if task_id > 20:
                (stay if degrees[task_id - 2] == degree else switch)[degree].append(elapsed)
    finally:
        await executor.stop()
    extra = [statistics.median(switch[degree]) - statistics.median(stay[degree]) for degree in (1, 2)]
    return extra, [statistics.median(stay[degree]) for degree in (1, 2)]


async def worker_memory(directory: Path) -> tuple[float, float]:
    """MiB that each worker holds alone (PSS, shared pages divided), and MiB of the model's weights."""
    from tetriserve.models.card import read_card

    executor = LocalExecutor(read_card(directory), PoolConfig(num_ranks=3))
    await executor.start(lambda text: None)
    try:
        pss = [_pss_mib(pid) for pid in executor.pids.values()]
    finally:
        await executor.stop()
    weights = sum(path.stat().st_size for path in directory.rglob("*.safetensors"))
    return statistics.fmean(pss), weights / 2**20


def _pss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9, help="engine and bare loop, in turn, per size and policy")
    num_pairs = parser.parse_args().pairs
    directory = asyncio.run(find_model(None, print)).path
    for policy in ("tetriserve", "fcfs"):
        for shape, ratios in asyncio.run(overhead(directory, policy, num_pairs)).items():
            low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
            print(
                f"denoise through the engine over a bare loop, {policy:10} {shape}: median {middle:.3f}x "
                f"(min {low:.3f}, max {high:.3f}, {len(ratios)} pairs; bar {BARS[shape]:.2f}x)"
            )
    extra, stay = asyncio.run(switch_times(directory))
    for degree, seconds, step_s in zip((1, 2), extra, stay, strict=True):
        print(
            f"switch to degree {degree}, warm group: {seconds * 1000:+.2f} ms over a task that stays "
            f"({step_s * 1000:.1f} ms; bar {SWITCH_BAR_S * 1000:.0f} ms)"
        )
    pss, weights = asyncio.run(worker_memory(directory))
    print(
        f"memory per worker: {pss:.0f} MiB, {pss - weights:.0f} MiB over the model's own {weights:.0f} MiB of weights"
    )


if __name__ == "__main__":
    main()
