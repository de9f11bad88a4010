"""What the decode of a video takes in its worker: seconds a latent frame, and the most memory the process ever has.

    python benchmarks/video_decode.py [--size 256x144] [--frames 9]

The VAE is that of Wan 2.1 with random weights, the rest of the pipeline is small. A worker with one thread decodes two
videos of the size given, one with a latent frame less than the other; their difference is a latent frame. Seconds are
the processor's, so that other work on the machine counts for little. What is said of 1280x720 with 81 frames is
computed from that, not measured: convolutions take time and memory by pixels, and from the second latent frame on each
takes the same. Sides are multiples of 16.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from dataclasses import replace
from pathlib import Path

from tetriserve.config import PoolConfig
from tetriserve.core.request import Shape
from tetriserve.examples.small_wan import build
from tetriserve.executor.local import LocalExecutor
from tetriserve.launch import find_model
from tetriserve.models.card import ModelCard
from tetriserve.profiler.bench import Bench

WANTED = Shape(720, 1280, 81)
START_TIMEOUT_S = 600.0
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=Shape.parse, default=Shape(144, 256))
    parser.add_argument("--frames", type=int, default=9)
    arguments = parser.parse_args()
    shape = replace(arguments.size, frames=arguments.frames)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "wan"
        build(path)
        write_vae(path / "vae")
        card = replace(find_model(str(path)), sizes=(Shape(32, 32, 1),))  # workers warm up with the smallest
        asyncio.run(report(card, shape))


def write_vae(folder: Path) -> None:
    """Of the published configuration, in place of the small one."""
    from diffusers import AutoencoderKLWan

    AutoencoderKLWan().save_pretrained(folder)


async def report(card: ModelCard, shape: Shape) -> None:
    pool = PoolConfig(num_ranks=1, num_threads=1, start_timeout_s=START_TIMEOUT_S)
    executor = LocalExecutor([card], pool)
    await executor.start(lambda text: None)
    try:
        bench = Bench(executor, "measuring a decode", (0,), 1)
        shorter = replace(shape, frames=shape.frames - card.frame_step)
        before_s, _, _ = await decode(bench, executor, card, shorter)
        seconds, idle_bytes, peak_bytes = await decode(bench, executor, card, shape)
    finally:
        await executor.stop()
    step, size = card.frame_step, f"{shape.width}x{shape.height}"
    each_s, num_latent = seconds - before_s, 1 + (shape.frames - 1) // step
    print(f"measured: {shape}, {num_latent} latent frames: {seconds:.1f} s")
    print(f"measured: {each_s:.2f} s a latent frame of {size}")
    print(f"measured: peak of the worker {peak_bytes / GIB:.2f} GiB, {idle_bytes / GIB:.2f} GiB before the decode")
    share = WANTED.height * WANTED.width / (shape.height * shape.width)
    wanted_latent = 1 + (WANTED.frames - 1) // step
    wanted_s = share * (seconds + (wanted_latent - num_latent) * each_s)
    wanted_bytes = idle_bytes + share * (peak_bytes - idle_bytes)
    raw_bytes = 3 * WANTED.num_pixels
    print(f"computed for {WANTED}: {share * each_s:.1f} s a latent frame, {wanted_s:.0f} s in all")
    print(f"computed for {WANTED}: peak of the worker {wanted_bytes / GIB:.1f} GiB")
    print(f"all frames together would be {raw_bytes / GIB:.2f} GiB as bytes, {4 * raw_bytes / GIB:.2f} GiB in float32")


async def decode(bench: Bench, executor: LocalExecutor, card: ModelCard, shape: Shape) -> tuple[float, int, int]:
    """Processor seconds of the stage, and bytes of the worker before it and at the most."""
    request = bench.request(card, shape, 1)
    await bench.encode(request, 0)
    await bench.denoise([request], (0,), 1)
    status = Path(f"/proc/{executor.pids[0]}/status")
    status.with_name("clear_refs").write_text("5")  # the peak begins anew
    idle_bytes = _bytes(status, "VmRSS")
    finished = await bench.decode(request, (0,))
    bench.forget([request])
    assert finished.cpu_s is not None
    return finished.cpu_s, idle_bytes, _bytes(status, "VmHWM")


def _bytes(status: Path, key: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
