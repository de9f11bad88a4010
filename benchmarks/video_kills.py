"""Workers killed one after the other while they make videos: none is lost, and a kill costs a task.

Two CPU ranks serve a tiny Wan with random weights. Some videos are always on their way; a worker that is busy is killed
with SIGKILL, the next one when its replacement is ready. Videos run at degree 1, so that their files do not depend on
the schedule: each is compared with that of an undisturbed run, byte by byte. Bars: every video ends with the right
file; no kill ends more than one task, and no step that was finished is made again. Run it with

    python benchmarks/video_kills.py [--kills 100]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from tetriserve.config import EngineConfig, ModelConfig, PoolConfig, SchedulingConfig
from tetriserve.core.events import TaskFailed
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.engine import Generation, LiveEngine, VideoWish
from tetriserve.engine.observers import Observation, Occurred
from tetriserve.examples import small_wan
from tetriserve.executor.local import LocalExecutor
from tetriserve.launch import StartProgress, launch
from tetriserve.models.checkpoint import read_card
from tetriserve.models.registry import family_of
from tetriserve.models.video_file import VideoFile
from tetriserve.profile import Profile, Row, save_profile
from tetriserve.workload.outcome import Outcome

SHAPES = (Shape(64, 64, 5), Shape(96, 96, 17))
NUM_STEPS, NUM_SEEDS, AT_ONCE = 12, 4, 4
LOOK_S = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wan"
        small_wan.build(path)
        sys.exit(asyncio.run(run(path, options.kills, random.Random(options.seed))))


def write_profile(path: Path) -> str:
    """With made-up times: what is looked at is not speed."""
    card = read_card(path)
    rows = [Row(stage=ENCODE, seconds=0.02)]
    for shape in SHAPES:
        size = {"height": shape.height, "width": shape.width, "frames": shape.frames}
        num_tokens = family_of(card).num_tokens(card, shape)
        rows.append(Row(stage=DENOISE, seconds=0.001 * num_tokens, tokens=num_tokens, **size))
        rows.append(Row(stage=DECODE, seconds=0.002 * num_tokens, **size))
    profile = Profile(
        model=card.name, fingerprint=card.fingerprint, hardware="written by hand", execution=card.execution,
        source="benchmarks/video_kills.py", created="2026-11-30", switch_s=0.002, frame_step=card.frame_step,
        rows=tuple(rows),
    )  # fmt: skip
    file = path / "profile.json"
    save_profile(profile, file)
    return str(file)


async def run(path: Path, num_kills: int, dice: random.Random) -> int:
    config = EngineConfig(
        models=(ModelConfig(path=str(path), profile=write_profile(path)),),
        pool=PoolConfig(num_ranks=2, degrees=(1,)),
        scheduling=SchedulingConfig(max_losses=1000),
    )
    jobs = await launch(config, StartProgress(step=lambda text: None))
    console = Console(highlight=False)
    try:
        return await kill_workers(jobs.engine, num_kills, dice, console)
    finally:
        await jobs.stop()


async def kill_workers(engine: LiveEngine, num_kills: int, dice: random.Random, console: Console) -> int:
    undisturbed = {seed: await made(engine, seed) for seed in range(NUM_SEEDS)}
    failed_tasks, outcomes, wrong = 0, [], 0
    is_over = asyncio.Event()

    def observe(observation: Observation) -> None:
        nonlocal failed_tasks
        if isinstance(observation, Outcome):
            outcomes.append(observation)
        elif isinstance(observation, Occurred) and isinstance(observation.event, TaskFailed):
            failed_tasks += 1

    engine.subscribe(observe)

    async def keep_busy(number: int) -> None:
        nonlocal wrong
        seed = number
        while not is_over.is_set():
            wrong += await made(engine, seed % NUM_SEEDS) != undisturbed[seed % NUM_SEEDS]
            seed += AT_ONCE

    clients = [asyncio.create_task(keep_busy(number)) for number in range(AT_ONCE)]
    executor = engine._executor
    assert isinstance(executor, LocalExecutor)
    for number in range(num_kills):
        while not (engine.state.in_flight and len(executor.ranks) == 2):
            await asyncio.sleep(LOOK_S)
        flight = dice.choice(engine.state.in_flight)
        os.kill(executor.pids[flight.task.ranks[0]], signal.SIGKILL)
        if (number + 1) % 20 == 0:
            console.print(f"{number + 1} kills, {len(outcomes)} videos")
        while len(executor.ranks) == 2:
            await asyncio.sleep(LOOK_S / 5)
    is_over.set()
    await asyncio.gather(*clients)
    steps = [sum(run.task.num_steps for run in outcome.runs) for outcome in outcomes]
    bars = {
        f"{len(outcomes)} videos, all with the file of an undisturbed run": wrong == 0,
        f"{num_kills} kills ended {failed_tasks} tasks": failed_tasks <= num_kills,
        "no finished step was made again": all(each == NUM_STEPS for each in steps),
    }
    for text, is_met in bars.items():
        console.print(f"{'yes' if is_met else 'NO ':3}  {text}")
    return 0 if all(bars.values()) else 1


async def made(engine: LiveEngine, seed: int) -> VideoFile:
    video = await engine.generate_video(
        Generation(
            prompt="a fox",
            size="64x64",
            num_steps=NUM_STEPS,
            seed=seed,
            degrees=(1,),
            slo_s=3600.0,
            video=VideoWish(num_frames=9),
        )  # fmt: skip
    )
    assert isinstance(video.content, VideoFile)
    return video.content


if __name__ == "__main__":
    main()
