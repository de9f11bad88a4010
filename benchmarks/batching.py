"""What batching is worth on the live engine: requests per second with it over without it, in one run (no GPU needed).

Engines of the bundled model, each with ranks of its own and the same measured profile, one without batching and one for
each limit of the batch, get the same bursts of requests in turn, so that drift hits all. Prints the ratios by size,
with how many requests shared a step on average, and the bars that the project sets itself: on one rank and, as an
overloaded server would be, on two. About ten minutes on two cores. Run with

    python benchmarks/batching.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tetriserve.config import EngineConfig, ModelConfig, PoolConfig, SchedulingConfig
from tetriserve.core.request import Shape
from tetriserve.engine import Generation, LiveEngine
from tetriserve.launch import StartProgress, launch, measure_profile
from tetriserve.profile import save_profile

QUIET = StartProgress(step=lambda text: None)
NUM_STEPS = 20
BURST = {Shape(256, 256): 16, Shape(512, 512): 6}
LIMITS = (1, 2, 4, 8)
GAIN_BAR, LOSS_BAR = 1.25, 0.97


@dataclass
class Tried:
    """One engine: seconds of its bursts, by size, and the batches of its steps."""

    engine: LiveEngine
    bursts_s: dict[Shape, list[float]] = field(default_factory=dict)
    batches: dict[Shape, list[int]] = field(default_factory=dict)

    async def burst(self, shape: Shape, seed: int) -> None:
        """As many requests at once as the engine cannot serve in time: their deadlines do not matter any more."""
        generations = [
            Generation(prompt=f"a red circle, {number}", size=str(shape), num_steps=NUM_STEPS, seed=seed, slo_s=0.01)
            for number in range(BURST[shape])
        ]
        started_at = time.perf_counter()
        images = await self.engine.generate_all(generations)
        self.bursts_s.setdefault(shape, []).append(time.perf_counter() - started_at)
        for image in images:
            runs = [run.task for run in image.outcome.runs if run.task.num_steps]
            self.batches.setdefault(shape, []).extend(task.batch for task in runs for _ in range(task.num_steps))


async def compare(num_ranks: int, num_rounds: int) -> dict[int, Tried]:
    """Engines by their limit, after `num_rounds` bursts of each size on each; the first bursts do not count."""
    with tempfile.TemporaryDirectory() as scratch:
        pool = PoolConfig(num_ranks=num_ranks, degrees=(1,), max_batch=max(LIMITS))
        _, profile = await measure_profile(None, pool, tuple(BURST), QUIET)
        path = Path(scratch) / "profile.json"
        save_profile(profile, path)
        for row in profile.rows:
            if row.tokens:
                print(f"  profile: {row.shape} in a batch of {row.batch}: {row.seconds:.4f} s a step")
        async with AsyncExitStack() as stack:
            tried: dict[int, Tried] = {}
            for limit in LIMITS:
                config = EngineConfig(
                    models=(ModelConfig(profile=str(path)),),
                    pool=PoolConfig(num_ranks=num_ranks, degrees=(1,), max_batch=limit),
                    scheduling=SchedulingConfig(max_queue=1000),
                )
                engine = (await launch(config, QUIET)).engine
                stack.push_async_callback(engine.stop)
                tried[limit] = Tried(engine)
            for number in range(num_rounds + 1):
                for shape in BURST:
                    for one in tried.values():
                        await one.burst(shape, number)
    for one in tried.values():
        for bursts_s in one.bursts_s.values():
            del bursts_s[0]
    return tried


def ratios(tried: dict[int, Tried], shape: Shape) -> dict[int, float]:
    """Throughput over that without batching, by limit: the median over rounds."""
    alone_s = tried[1].bursts_s[shape]
    return {
        limit: statistics.median(s1 / s for s1, s in zip(alone_s, one.bursts_s[shape], strict=True))
        for limit, one in tried.items()
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    bars: dict[str, bool] = {}
    for num_ranks in (1, 2):
        print(f"{num_ranks} rank{'s' * (num_ranks > 1)}")
        tried = await compare(num_ranks, options.rounds)
        for shape in BURST:
            found = ratios(tried, shape)
            for limit, ratio in found.items():
                mean = statistics.fmean(tried[limit].batches[shape])
                rate = BURST[shape] / statistics.median(tried[limit].bursts_s[shape])
                print(f"  {shape}, up to {limit} together: {ratio:.2f} x ({rate:.2f} a second, {mean:.1f} a step)")
            largest = found[max(LIMITS)]
            if shape == Shape(256, 256) and num_ranks == 1:
                text = f"one rank, {shape}: {largest:.2f} times the throughput, at least {GAIN_BAR}"
                bars[text] = largest >= GAIN_BAR
            least = min(found.values())
            bars[f"{num_ranks} ranks, {shape}: never below {LOSS_BAR} of it: {least:.2f}"] = least >= LOSS_BAR
    for text, is_kept in bars.items():
        print(f"{'yes' if is_kept else 'NO ':4} {text}")


if __name__ == "__main__":
    asyncio.run(main())
