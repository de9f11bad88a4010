"""Workers killed and stopped while their team exchanges: how soon the others are back for work, and whether it shows.

A request is denoised on random sets of four ranks. In the middle of a task a random member is killed, or stopped until
it is found silent; the task is done again from the request's last copy by ranks that live. Every image is compared
with that of the same request undisturbed at degree 1.

    python benchmarks/team_faults.py [--faults 200] [--seed 0] [--collectives shm]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tetriserve.config import PoolConfig
from tetriserve.core.events import Event, StartTask, TaskFailed, TaskFinished, Work
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, image_stages
from tetriserve.executor.local import LocalExecutor
from tetriserve.launch import find_model
from tetriserve.models.checkpoint import read_card
from tetriserve.worker.bundle import arrays_of

NUM_RANKS, HEADS = 4, 12
"""Heads that 2, 3 and 4 ranks can share."""
NUM_STEPS, STEPS_PER_TASK = 12, 6
SHAPES = (Shape(256, 256), Shape(160, 224))
HEARTBEAT_S, HANG_S = 2.0, 60.0
BACK_BAR_S, BACK_BAR_SHARE = 0.05, 0.99
MAX_LEVELS = 1


@dataclass
class Pool:
    executor: LocalExecutor
    events: list[Event] = field(default_factory=list)
    _ends: dict[int, asyncio.Future[TaskFinished | TaskFailed]] = field(default_factory=dict)
    _ids: itertools.count[int] = field(default_factory=itertools.count)

    def start_task(
        self, work: Work, stage: str, ranks: Sequence[int], num_steps: int = 0
    ) -> asyncio.Future[TaskFinished | TaskFailed]:
        task_id = next(self._ids)
        end = self._ends[task_id] = asyncio.get_running_loop().create_future()
        task = Task((work.request.request_id,), stage, tuple(ranks), num_steps)
        self.executor.start_task(StartTask(task_id, task, (work,)))
        return end

    async def run(self, work: Work, stage: str, num_steps: int = 0, rng: random.Random | None = None) -> Work:
        """On ranks that live, one or, given `rng`, a random set; again if others than `rng`'s victims die."""
        while True:
            ranks = await self.choose(rng) if rng else [min(await self.alive(1))]
            end = await asyncio.wait_for(self.start_task(work, stage, ranks, num_steps), HANG_S)
            if isinstance(end, TaskFinished):
                return after(work, stage, end)

    async def choose(self, rng: random.Random) -> list[int]:
        alive = await self.alive(2)
        ranks = rng.sample(alive, rng.randint(2, len(alive)))
        return ranks

    async def alive(self, least: int) -> list[int]:
        async with asyncio.timeout(HANG_S):
            while len(self.executor.ranks) < least:
                await asyncio.sleep(0.01)
        return sorted(self.executor.ranks)

    def on_event(self, event: Event) -> None:
        if isinstance(event, TaskFinished | TaskFailed):
            self._ends.pop(event.task_id).set_result(event)


def after(work: Work, stage: str, finished: TaskFinished) -> Work:
    (result,) = finished.results
    trajectory = work.trajectory.after(result.num_steps, is_stage_over=result.is_stage_over)
    states = {**work.states, stage: result.left}
    return Work(work.request, trajectory.stage_index, trajectory.stage_steps_done, states)


def request_of(number: int, name: str) -> Request:
    return Request(
        request_id=f"{name}-{number}", prompt=f"{number} red circles", shape=SHAPES[number % len(SHAPES)],
        stages=image_stages(NUM_STEPS), seed=number, arrival_s=0.0, deadline_s=0.0,
    )  # fmt: skip


@dataclass
class Outcome:
    """kill_back_s: from a kill to the end of the task, when all survivors are idle. num_missed: the task was over."""

    kill_back_s: list[float] = field(default_factory=list)
    stop_back_s: list[float] = field(default_factory=list)
    num_missed: int = 0
    num_images: int = 0
    num_wrong: int = 0


async def hurt(pool: Pool, work: Work, rng: random.Random, outcome: Outcome) -> Work:
    """One task with a fault in its middle, and again until it is done."""
    ranks = await pool.choose(rng)
    victim, is_kill = rng.choice(ranks), rng.random() < 0.75
    pid = pool.executor.pids[victim]
    end = pool.start_task(work, DENOISE, ranks, STEPS_PER_TASK)
    await asyncio.sleep(rng.uniform(0.005, 0.12))
    if end.done():
        outcome.num_missed += 1
        ended = end.result()
        return after(work, DENOISE, ended) if isinstance(ended, TaskFinished) else work
    os.kill(pid, signal.SIGKILL if is_kill else signal.SIGSTOP)
    hurt_at = time.monotonic()
    ended = await asyncio.wait_for(end, HANG_S)
    back_s = time.monotonic() - hurt_at
    if isinstance(ended, TaskFinished):  # the victim had done its part
        outcome.num_missed += 1
        return after(work, DENOISE, ended)
    (outcome.kill_back_s if is_kill else outcome.stop_back_s).append(back_s)
    return await pool.run(work, DENOISE, STEPS_PER_TASK, rng)


async def campaign(directory: Path, num_faults: int, seed: int, collectives: str) -> Outcome:
    rng, outcome = random.Random(seed), Outcome()
    settings = PoolConfig(num_ranks=NUM_RANKS, collectives=collectives, heartbeat_timeout_s=HEARTBEAT_S)
    pool = Pool(LocalExecutor([read_card(directory)], settings))
    await pool.executor.start(lambda text: None)
    pool.executor.subscribe(pool.on_event)
    try:
        expected = [pixels_of(pool, await alone(pool, request_of(number, "alone"))) for number in range(8)]
        while len(outcome.kill_back_s) + len(outcome.stop_back_s) < num_faults:
            number = rng.randrange(len(expected))
            work = await pool.run(Work(request_of(number, f"hurt{outcome.num_images}"), 0, 0, {}), ENCODE)
            for _ in range(NUM_STEPS // STEPS_PER_TASK):
                work = await hurt(pool, work, rng, outcome)
            work = await pool.run(work, DECODE)
            levels = np.abs(pixels_of(pool, work).astype(int) - expected[number])
            outcome.num_images += 1
            outcome.num_wrong += int(levels.max() > MAX_LEVELS)
            pool.executor.forget(work.request.request_id)
            if sys.stderr.isatty():
                print(f"\r{len(outcome.kill_back_s) + len(outcome.stop_back_s)} faults", end="", file=sys.stderr)
    finally:
        await pool.executor.stop()
    return outcome


async def alone(pool: Pool, request: Request) -> Work:
    work = await pool.run(Work(request, 0, 0, {}), ENCODE)
    return await pool.run(await pool.run(work, DENOISE, NUM_STEPS), DECODE)


def pixels_of(pool: Pool, work: Work) -> np.ndarray:
    return arrays_of(pool.executor.states.get(work.states[DECODE]))["pixels"]


def make_model(directory: Path) -> Path:
    """The bundled model with a random transformer of `HEADS` heads."""
    import torch
    from diffusers import FluxTransformer2DModel

    shutil.copytree(find_model(None).path, directory)
    config = json.loads((directory / "transformer/config.json").read_text())
    shutil.rmtree(directory / "transformer")
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel.from_config(config | {"num_attention_heads": HEADS})
    transformer.save_pretrained(directory / "transformer")
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--collectives", default="shm")
    arguments = parser.parse_args()
    started_at = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(Path(directory) / "model")
        outcome = asyncio.run(campaign(model, arguments.faults, arguments.seed, arguments.collectives))
    kills, stops = sorted(outcome.kill_back_s), sorted(outcome.stop_back_s)
    if kills:
        soon = sum(back_s <= BACK_BAR_S for back_s in kills) / len(kills)
        print(
            f"{len(kills)} kills: survivors back for work after {1000 * statistics.median(kills):.1f} ms (median), "
            f"{1000 * kills[-1]:.0f} ms at most;\n"
            f"  within {1000 * BACK_BAR_S:.0f} ms in {soon:.1%} (bar {BACK_BAR_SHARE:.0%})"
        )
    if stops:
        print(
            f"{len(stops)} stops, found after {HEARTBEAT_S:g} s of silence: back after "
            f"{statistics.median(stops):.2f} s (median), {stops[-1]:.2f} s at most"
        )
    print(
        f"{outcome.num_images} images, {outcome.num_wrong} wrong; {outcome.num_missed} faults came too late to matter"
    )
    print(f"no hang; {time.monotonic() - started_at:.0f} s in all")


if __name__ == "__main__":
    main()
