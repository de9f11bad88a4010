"""Decodes that ranks share, tile by tile: seconds by degree, and their ratios to degree 1.

    python benchmarks/wide_decode.py [--rounds 5] [--base-dim 24]

With --vae-tiling: a picture of the bundled model at 1024x1024, and a video by a VAE of Wan 2.1's configuration with
random weights and so many channels (published: 96, which takes 16 times as long). Degrees are 1, 2 and, with as many
cores, 4, in turn.

Ratios are given by the clock, and by processor seconds of the leader, which decodes its share of the tiles and joins
all of them: what it would take on a core of its own, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tetriserve.config import ExecutionConfig, PoolConfig
from tetriserve.core.request import Request, Shape
from tetriserve.examples.small_wan import build
from tetriserve.executor.local import LocalExecutor
from tetriserve.launch import find_model
from tetriserve.models.card import ModelCard
from tetriserve.profiler.bench import Bench

PICTURE = Shape(1024, 1024)
VIDEO = Shape(256, 448, 5)
SMALLEST = Shape(32, 32, 1)
"""With which workers of the video's model warm up."""
BAR = 0.60
"""Of the leader's seconds at degree 2 over those at degree 1: half of the tiles, and joining them."""
TILED = ExecutionConfig(vae_tiling=True)


@dataclass
class Times:
    """Of one degree: seconds by the clock, and of the leader's processor."""

    elapsed_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="decodes at each degree")
    parser.add_argument("--base-dim", type=int, default=24, help="channels of the video's VAE")
    arguments = parser.parse_args()
    degrees = [degree for degree in (1, 2, 4) if degree <= max(2, len(os.sched_getaffinity(0)))]
    asyncio.run(report(find_model(None, execution=TILED), PICTURE, degrees, arguments.rounds))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "wan"
        build(path)
        write_vae(path / "vae", arguments.base_dim)
        card = find_model(str(path), execution=TILED)
        asyncio.run(report(replace(card, sizes=(SMALLEST,)), VIDEO, degrees, arguments.rounds))


def write_vae(folder: Path, base_dim: int) -> None:
    """In place of the small one."""
    from diffusers import AutoencoderKLWan

    AutoencoderKLWan(base_dim=base_dim).save_pretrained(folder)


async def report(card: ModelCard, shape: Shape, degrees: Sequence[int], num_rounds: int) -> None:
    pool = PoolConfig(num_ranks=degrees[-1], num_threads=1)
    executor = LocalExecutor([card], pool)
    await executor.start(lambda text: None)
    times = {degree: Times() for degree in card.short_degrees("decode", shape, degrees)}
    try:
        bench = Bench.of(executor, "measuring decodes", card, pool)
        request = bench.request(card, shape, 1)
        await bench.encode(request, 0)
        await bench.denoise([request], (0,), 1)
        for number in range(num_rounds + 1):
            for degree in times:
                await decode(bench, request, times[degree] if number else Times(), degree)  # the first warms
    finally:
        await executor.stop()
    assert card.tiles is not None
    print(f"{card.name} at {shape}, {card.tiles.count(shape)} tiles:")
    for degree, each in times.items():
        elapsed_s, cpu_s = statistics.median(each.elapsed_s), statistics.median(each.cpu_s)
        by_clock = elapsed_s / statistics.median(times[1].elapsed_s)
        by_processor = cpu_s / statistics.median(times[1].cpu_s)
        bar = f" (bar {BAR:.2f})" if degree == 2 else ""
        print(
            f"  degree {degree}: {elapsed_s:.2f} s, {by_clock:.2f}x; {cpu_s:.2f} s of the leader's processor, "
            f"{by_processor:.2f}x{bar}"
        )


async def decode(bench: Bench, request: Request, times: Times, degree: int) -> None:
    finished = await bench.decode(request, tuple(range(degree)))
    assert finished.cpu_s is not None
    times.elapsed_s.append(finished.elapsed_s)
    times.cpu_s.append(finished.cpu_s)


if __name__ == "__main__":
    main()
