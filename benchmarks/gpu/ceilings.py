"""What one GPU gives: the ceilings of matrix products and copies, and how near a step of FLUX.1-dev comes to them.

Random weights are made on the device, no model is needed. With `--write-model DIRECTORY` a process beside this one
writes a whole checkpoint of that size for `serving.py`, once it has let go of the device. About nine minutes:

    python benchmarks/gpu/ceilings.py [--write-model DIRECTORY] [--dry-run]

`mfu` is the share of the measured ceiling of matrix products, `host_ms` the time until the work is launched, `first_s`
the first step with its compilation.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flux
import torch
from recording import Recording, add_options, begin, median

LIMIT_S = 510.0
NUM_WARM_UPS, NUM_REPEATS = 3, 10
BACKENDS = ("native", "_native_flash", "_native_cudnn", "flash", "_flash_3", "sage")
CPU_BACKENDS = ("native", "flash")
"""The last is absent there, which has to end in a row too."""
SMALL_SIDES = 2
"""Of the smallest sides, whose steps are so short that a graph may pay."""


@dataclass(frozen=True)
class Times:
    """Medians. host_s: until the work was launched. peak_bytes: of the allocator; None on a CPU."""

    seconds: float
    host_s: float
    peak_bytes: int | None

    @property
    def figures(self) -> dict[str, float]:
        peak = {} if self.peak_bytes is None else {"peak_gb": round(self.peak_bytes / 1e9, 2)}
        return {"ms": median([self.seconds], 1e3), "host_ms": median([self.host_s], 1e3), **peak}


class Stopwatch:
    """Times work on a device: by events on a GPU, by the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_gpu = device.type == "cuda"

    def time(self, work: Callable[[], object]) -> Times:
        for _ in range(NUM_WARM_UPS):
            work()
        if self._is_gpu:
            torch.cuda.reset_peak_memory_stats()
        taken = [self._once(work) for _ in range(NUM_REPEATS)]
        seconds, host_s = zip(*taken, strict=True)
        peak_bytes = torch.cuda.max_memory_allocated() if self._is_gpu else None
        return Times(median(seconds), median(host_s), peak_bytes)

    def _once(self, work: Callable[[], object]) -> tuple[float, float]:
        if not self._is_gpu:
            started_at = time.perf_counter()
            work()
            elapsed_s = time.perf_counter() - started_at
            return elapsed_s, elapsed_s
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        started_at = time.perf_counter()
        begun.record()
        work()
        ended.record()
        host_s = time.perf_counter() - started_at
        torch.cuda.synchronize()
        return begun.elapsed_time(ended) / 1e3, host_s


def measure_ceilings(recording: Recording, stopwatch: Stopwatch, device: torch.device, *, is_dry_run: bool) -> float:
    """FLOP/s of the best product of two bf16 matrices of random numbers."""
    best = 0.0
    for side in (256, 512) if is_dry_run else (4096, 8192, 16384):
        a, b = (torch.randn(side, side, device=device, dtype=flux.DTYPE) for _ in range(2))
        times = stopwatch.time(partial(torch.matmul, a, b))
        best = max(best, 2 * side**3 / times.seconds)
        recording.row(f"product, {side}", tflops=2 * side**3 / times.seconds / 1e12, **times.figures)
    source = torch.randint(256, (2**22 if is_dry_run else 2**32,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = stopwatch.time(lambda: target.copy_(source))
    recording.row("copy", tb_s=2 * source.nbytes / times.seconds / 1e12, **times.figures)
    host = torch.empty(source.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    times = stopwatch.time(lambda: host.copy_(source, non_blocking=True))
    recording.row("copy to the host", tb_s=source.nbytes / times.seconds / 1e12, **times.figures)
    return best


class Steps:
    """Steps of one transformer, at every size, run in one way after the other."""

    def __init__(
        self, recording: Recording, stopwatch: Stopwatch, transformer: Any, scale: flux.Scale, ceiling: float | None
    ) -> None:
        self.transformer = transformer
        self._recording = recording
        self._stopwatch = stopwatch
        self.scale = scale
        self._ceiling = ceiling
        self._compiler = "inductor" if transformer.device.type == "cuda" else "aot_eager"

    def measure(self, name: str) -> None:
        for side in self.scale.sides:
            with self._recording.case(f"{name}, {side}"):
                inputs = flux.step_inputs(self.transformer, self.scale, side)
                started_at = time.perf_counter()
                is_finite = bool(self.transformer(**inputs)[0].isfinite().all())
                first_s = time.perf_counter() - started_at
                times = self._stopwatch.time(partial(self.transformer, **inputs))
                figures = {**times.figures, **self._mfu(side, times), "first_s": median([first_s])}
                self._recording.row(f"{name}, {side}", **figures, **({} if is_finite else {"note": "not finite"}))

    def _step(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        output: torch.Tensor = self.transformer(**inputs)[0]
        return output

    def _mfu(self, side: int, times: Times) -> dict[str, float]:
        if self._ceiling is None:
            return {}
        return {"mfu": median([flux.num_flop(self.transformer, self.scale, side) / times.seconds / self._ceiling])}

    def measure_graph(self, name: str) -> None:
        """Steps replayed as one graph, at the small sizes; on a CPU they are only run again."""
        for side in self.scale.sides[:SMALL_SIDES]:
            with self._recording.case(f"{name}, {side}"):
                inputs = flux.step_inputs(self.transformer, self.scale, side)
                replay, output = capture(partial(self._step, inputs), self.transformer.device)
                times = self._stopwatch.time(replay)
                inputs["hidden_states"].normal_()
                replay()
                difference = (output - self._step(inputs)).abs().max().item()
                self._recording.row(f"{name}, {side}", **times.figures, difference=difference)

    @contextmanager
    def compiled(self, **options: Any) -> Iterator[None]:
        """With each kind of block compiled once, as diffusers' regional compilation does."""
        torch.compiler.reset()
        self.transformer.compile_repeated_blocks(fullgraph=True, backend=self._compiler, **options)
        try:
            yield
        finally:
            for module in self.transformer.modules():
                module._compiled_call_impl = None


def capture(work: Callable[[], torch.Tensor], device: torch.device) -> tuple[Callable[[], object], torch.Tensor]:
    """What replays `work`, and the tensor that holds its result then."""
    if device.type != "cuda":
        output = work()
        return lambda: output.copy_(work()), output
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(NUM_WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work()
    return graph.replay, output


def measure_attention(recording: Recording, steps: Steps, backends: tuple[str, ...]) -> list[str]:
    """Eager steps with each backend. The names of those that are there."""
    present = []
    for backend in backends:
        try:
            steps.transformer.set_attention_backend(backend)
            steps.transformer(**flux.step_inputs(steps.transformer, steps.scale, steps.scale.sides[0]))
        except Exception as error:  # each backend has errors of its own
            recording.row(f"eager, {backend}", skipped=f"{type(error).__name__}: {error}"[:200])
            continue
        present.append(backend)
        steps.measure(f"eager, {backend}")
    return present


def measure_fp8(recording: Recording, steps: Steps) -> None:
    """Products in FP8 with scales for each row, compiled. The transformer stays so."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as error:
        recording.row("fp8", skipped=str(error))
        return

    def is_in_block(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and "transformer_blocks" in name and ".norm" not in name

    quantize_(steps.transformer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), is_in_block)
    with steps.compiled(dynamic=True):
        steps.measure("fp8, compiled")


def measure_decode(recording: Recording, stopwatch: Stopwatch, scale: flux.Scale, device: torch.device) -> None:
    for way in ("plain", "channels_last", "tiled"):
        vae = flux.make_vae(scale, device)
        if way == "channels_last":
            vae.to(memory_format=torch.channels_last)
        if way == "tiled":
            vae.enable_tiling()
        for side in scale.sides:
            with recording.case(f"{way}, {side}"):
                latents = torch.randn(1, 16, side // 8, side // 8, device=device, dtype=flux.DTYPE)
                times = stopwatch.time(partial(vae.decode, latents, return_dict=False))
                recording.row(f"{way}, {side}", **times.figures)


@contextmanager
def writing(recording: Recording, directory: Path | None, *, is_dry_run: bool) -> Iterator[None]:
    """Meanwhile a process writes a checkpoint, from host memory: it is waited for until it has left the device."""
    if directory is None:
        yield
        return
    command = [sys.executable, str(Path(flux.__file__)), str(directory), *(["--dry-run"] if is_dry_run else [])]
    recording.enter("model directory")
    started_at = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        made = process.stdout.readline().strip()
        recording.row("made" if made == flux.MADE else "failed", took_s=time.perf_counter() - started_at)
        yield
        recording.enter("model directory")
        process.wait()
        num_bytes = sum(file.stat().st_size for file in directory.rglob("*.safetensors"))
        figures = {"gb": num_bytes / 1e9, "took_s": time.perf_counter() - started_at, "exit_code": process.returncode}
        recording.row("written", **figures)
    finally:
        process.kill()
        process.wait()


@torch.no_grad()
def measure(recording: Recording, *, is_dry_run: bool) -> None:
    scale, device = flux.scale_of(is_dry_run), flux.device_of(is_dry_run)
    stopwatch, ceiling, steps = Stopwatch(device), None, None
    with recording.section("ceilings", 60) as runs:
        if runs:
            ceiling = measure_ceilings(recording, stopwatch, device, is_dry_run=is_dry_run)
    present = ["native"]
    with recording.section("eager", 120) as runs:
        started_at = time.perf_counter()
        steps = Steps(recording, stopwatch, flux.make_transformer(scale, device), scale, ceiling)
        num_bytes = sum(parameter.nbytes for parameter in steps.transformer.parameters())
        recording.row("model made", took_s=time.perf_counter() - started_at, gb=num_bytes / 1e9)
        if runs:
            present = measure_attention(recording, steps, CPU_BACKENDS if is_dry_run else BACKENDS)
    if steps is None:
        return
    with recording.section("graph", 40) as runs:
        if runs:
            steps.transformer.set_attention_backend(present[0])
            steps.measure_graph("eager")
    with recording.section("compiled", 240) as runs:
        for backend in present if runs else ():
            steps.transformer.set_attention_backend(backend)
            with steps.compiled(dynamic=True):
                steps.measure(f"{backend}, any size")
                if backend == present[0]:
                    steps.measure_graph(f"{backend}, as a graph")
        if runs:
            steps.transformer.set_attention_backend(present[0])
            with steps.compiled(dynamic=False):
                steps.measure(f"{present[0]}, a graph per size")
    with recording.section("decode", 60) as runs:
        if runs:
            measure_decode(recording, stopwatch, scale, device)
    with recording.section("fp8", 120) as runs:
        if runs:
            measure_fp8(recording, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "ceilings")
    parser.add_argument("--write-model", type=Path, metavar="DIRECTORY", help="write a checkpoint of that size, too")
    options = parser.parse_args()
    recording = begin(options, LIMIT_S)
    with writing(recording, options.write_model, is_dry_run=options.dry_run):
        measure(recording, is_dry_run=options.dry_run)
    recording.end()


if __name__ == "__main__":
    main()
