"""A checkpoint of FLUX.1-dev's size served on one GPU: what the server, its tasks and its repairs cost.

The checkpoint has random weights and is written first unless `ceilings.py --write-model` has done so. A server of one
rank is started and loaded for a minute, then a `FluxPipeline` behind a lock with the same requests; then two ranks on
the one GPU run tasks beside a bare loop, change degree, and one of them is killed. About seven minutes:

    python benchmarks/gpu/serving.py [--model DIRECTORY] [--dry-run]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import flux
from recording import Recording, add_options, begin, median

from tetriserve.config import PoolConfig
from tetriserve.core.events import Event, StartTask, TaskFailed, TaskFinished, Work, WorkerJoined, WorkerLost
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DENOISE, ENCODE, image_stages
from tetriserve.executor.local import LocalExecutor
from tetriserve.executor.processes import ProcessStarter
from tetriserve.models.card import ModelCard
from tetriserve.models.checkpoint import read_card

LIMIT_S = 480.0
TASKS_LIMIT_S = 190.0
START_LIMIT_S = 180.0
ANSWER_LIMIT_S = 120.0
POLL_S = 0.05
LOAD, SLO_MULTIPLE = 0.85, 3.0
"""Of the bench: the share of what one rank can do, and deadlines over the time alone."""
NUM_TASKS = 10
TASK_STEPS = (1, 5)
MANY_STEPS = 500


@dataclass(frozen=True)
class Setting:
    """bench_s: how long the bench sends requests, each of `num_steps` steps."""

    directory: Path
    cache: Path
    device: str
    sides: tuple[int, ...]
    num_steps: int
    bench_s: float

    @property
    def environment(self) -> dict[str, str]:
        """Of servers: no options from outside, and no profile that an earlier start has kept."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TETRISERVE_")}
        return inherited | {"XDG_CACHE_HOME": str(self.cache)}

    def pool(self, num_ranks: int) -> PoolConfig:
        """All its ranks share the GPU."""
        if self.device == "cpu":
            return PoolConfig(num_ranks=num_ranks)
        return PoolConfig(
            num_ranks=num_ranks, device="cuda", ranks_per_gpu=num_ranks, heartbeat_timeout_s=30.0,
            start_timeout_s=START_LIMIT_S,
        )  # fmt: skip

    def serve_command(self, port: int) -> list[str]:
        command = [sys.executable, "-m", "tetriserve", "serve", str(self.directory), "--port", str(port)]
        command += ["--device", self.device, "--ranks", "1", "--max-batch", "1", "--heartbeat-timeout", "30"]
        return [*command, "--start-timeout", str(START_LIMIT_S)]

    def plain_command(self, port: int, card: ModelCard) -> list[str]:
        script = Path(__file__).parents[1] / "plain_server.py"
        command = [sys.executable, str(script), str(self.directory), "--port", str(port), "--threads", "1"]
        command += ["--text-tokens", str(card.num_text_tokens), "--dtype", card.execution.dtype]
        return [*command, "--device", self.device]


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server process, ended by SIGTERM."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(ANSWER_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until_there(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until `url` answers 200."""
    gives_up_at = time.monotonic() + START_LIMIT_S
    while time.monotonic() < gives_up_at:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {log.read_text(errors='replace')[-250:]}")
        try:
            with urllib.request.urlopen(url, timeout=ANSWER_LIMIT_S):
                return
        except OSError:
            time.sleep(POLL_S)
    raise RuntimeError(f"the server was not ready within {START_LIMIT_S:g} s")


def draw(port: int, side: int, num_steps: int) -> float:
    """Seconds of one picture, by the client's clock."""
    body = {"prompt": "a red circle", "size": f"{side}x{side}", "num_inference_steps": num_steps, "seed": 1}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/images/generations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    started_at = time.perf_counter()
    with urllib.request.urlopen(request, timeout=ANSWER_LIMIT_S) as answer:
        answer.read()
    return time.perf_counter() - started_at


def memory(pids: Sequence[int]) -> dict[str, float]:
    """GB of the host that the processes hold (pages that several share are counted once), and of the GPU in all."""
    kilobytes = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        kilobytes += int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    figures = {"host_gb": kilobytes * 1024 / 1e9}
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        used = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return figures
    return figures | {"gpu_gb": int(used.split()[0]) * 2**20 / 1e9}


def family(pid: int) -> Iterator[int]:
    """A process and all its descendants."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from family(int(child))


def serve(recording: Recording, setting: Setting) -> dict[int, float]:
    """Start the server, draw each size alone, and load it; seconds of each size alone."""
    port, log = free_port(), setting.cache / "server.log"
    started_at = time.perf_counter()
    with running(setting.serve_command(port), setting.environment, log) as process:
        until_there(process, f"http://127.0.0.1:{port}/ready", log)
        recording.row("ready, its profile measured", took_s=time.perf_counter() - started_at)
        alone_s = draw_alone(recording, port, setting)
        recording.row("memory", **memory([*family(process.pid)]))
        bench(recording, "bench", port, alone_s, setting)
    return alone_s


def serve_plain(recording: Recording, setting: Setting, alone_s: Mapping[int, float]) -> None:
    """The same load for what one would write instead; deadlines as of our server."""
    port, log = free_port(), setting.cache / "plain.log"
    started_at = time.perf_counter()
    with running(setting.plain_command(port, read_card(setting.directory)), setting.environment, log) as process:
        until_there(process, f"http://127.0.0.1:{port}/v1/models", log)
        recording.row("ready", took_s=time.perf_counter() - started_at)
        own_s = draw_alone(recording, port, setting)
        recording.row("memory", **memory([*family(process.pid)]))
        bench(recording, "bench", port, alone_s or own_s, setting)


def draw_alone(recording: Recording, port: int, setting: Setting) -> dict[int, float]:
    alone_s = {}
    for side in setting.sides:
        first_s, alone_s[side] = (draw(port, side, setting.num_steps) for _ in range(2))
        recording.row(f"{side} alone, {setting.num_steps} steps", first_s=first_s, took_s=alone_s[side])
    return alone_s


def bench(recording: Recording, case: str, port: int, alone_s: Mapping[int, float], setting: Setting) -> None:
    """As many requests of each size, at `LOAD` times what one rank can do, for so long as the setting says."""
    rate_per_s = LOAD / statistics.fmean(alone_s.values())
    results = setting.cache / f"bench-{port}.json"
    sizes = [f"{side}x{side}" for side in alone_s]
    command = [sys.executable, "-m", "tetriserve", "bench", "--port", str(port), "--seed", "0"]
    deadlines_s = [SLO_MULTIPLE * taken_s for taken_s in alone_s.values()]
    slo_table = ",".join(f"{size}:{deadline_s:.4f}" for size, deadline_s in zip(sizes, deadlines_s, strict=True))
    command += ["--mix", ",".join(f"{size}:1" for size in sizes), "--rate", f"{60 * rate_per_s:.3f}"]
    command += ["--num-prompts", str(max(3, round(setting.bench_s * rate_per_s)))]
    command += ["--num-inference-steps", str(setting.num_steps), "--warmup-requests", "0"]
    command += ["--slo-table", slo_table, "--output-file", str(results), "--timeout", str(ANSWER_LIMIT_S)]
    limit_s = setting.bench_s + ANSWER_LIMIT_S
    subprocess.run(command, check=True, env=setting.environment, stdout=sys.stderr, timeout=limit_s)
    found = json.loads(results.read_text())
    recording.row(
        case,
        sar=found["slo_attainment_rate"],
        p50_s=found["latency_p50"],
        p99_s=found["latency_p99"],
        done=found["completed_requests"],
        failed=found["failed_requests"],
        per_min=60 * found["throughput_qps"],
    )


def bare_loop(directory: Path, device: str, is_dry_run: bool, connection: Connection) -> None:
    """A process that runs steps of the transformer and nothing else: is sent sides and numbers, answers in seconds."""
    import torch
    from diffusers import FluxTransformer2DModel

    torch.set_num_threads(1)
    transformer = FluxTransformer2DModel.from_pretrained(directory / "transformer", torch_dtype=flux.DTYPE).to(device)
    connection.send("ready")
    with torch.no_grad():
        while True:
            try:
                side, num_steps = connection.recv()
            except EOFError:
                return
            inputs = flux.step_inputs(transformer, flux.scale_of(is_dry_run), side)
            transformer(**inputs)
            _settle(device)
            started_at = time.perf_counter()
            for _ in range(num_steps):
                inputs["hidden_states"] = inputs["hidden_states"] - 0.01 * transformer(**inputs)[0]
            _settle(device)
            connection.send(time.perf_counter() - started_at)


def _settle(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


class Tasks:
    """Runs tasks on an executor, and remembers when it told what."""

    def __init__(self, executor: LocalExecutor) -> None:
        self._executor = executor
        self._ids = itertools.count()
        self._ends: dict[int, asyncio.Future[TaskFinished | TaskFailed]] = {}
        self._works: dict[str, Work] = {}
        self.told_at: dict[type[Event], float] = {}
        self.joined = asyncio.Event()
        executor.subscribe(self._on_event)

    async def begin(self, name: str, side: int, rank: int) -> None:
        """Encode a new request."""
        request = Request(
            request_id=name, prompt=name, shape=Shape(side, side), stages=image_stages(MANY_STEPS), seed=0,
            arrival_s=0.0, deadline_s=0.0,
        )  # fmt: skip
        self._works[name] = Work(request, 0, 0, {})
        await self.run(name, (rank,), 0)

    def end(self, name: str) -> None:
        self._executor.forget(name)

    async def run(self, name: str, ranks: tuple[int, ...], num_steps: int) -> float:
        """One task of the request, and how long it took as seen from here."""
        started_at = time.perf_counter()
        end = await self.outcome(name, ranks, num_steps)
        elapsed_s = time.perf_counter() - started_at
        if isinstance(end, TaskFailed):
            raise RuntimeError(end.message)
        work, stage, (result,) = self._works[name], DENOISE if num_steps else ENCODE, end.results
        after = work.trajectory.after(result.num_steps, is_stage_over=result.is_stage_over)
        states = {**work.states, stage: result.left}
        self._works[name] = Work(work.request, after.stage_index, after.stage_steps_done, states)
        return elapsed_s

    async def outcome(self, name: str, ranks: tuple[int, ...], num_steps: int) -> TaskFinished | TaskFailed:
        task_id, work = next(self._ids), self._works[name]
        ended = self._ends[task_id] = asyncio.get_running_loop().create_future()
        task = Task((name,), DENOISE if num_steps else ENCODE, ranks, num_steps)
        self._executor.start_task(StartTask(task_id, task, (work,)))
        return await asyncio.wait_for(ended, ANSWER_LIMIT_S)

    def _on_event(self, event: Event) -> None:
        self.told_at[type(event)] = time.perf_counter()
        if isinstance(event, TaskFinished | TaskFailed):
            self._ends.pop(event.task_id).set_result(event)
        elif isinstance(event, WorkerJoined):
            self.joined.set()


@asynccontextmanager
async def two_ranks(
    recording: Recording, card: ModelCard, setting: Setting
) -> AsyncIterator[tuple[LocalExecutor, Tasks]]:
    executor = LocalExecutor([card], setting.pool(2))
    started_at = time.perf_counter()
    await executor.start(lambda text: None)
    try:
        recording.row("two ranks ready", took_s=time.perf_counter() - started_at, **memory([*executor.pids.values()]))
        yield executor, Tasks(executor)
    finally:
        await executor.stop()


async def compare_with_bare_loop(
    recording: Recording, card: ModelCard, tasks: Tasks, setting: Setting, *, is_dry_run: bool
) -> None:
    """Seconds of a step in tasks of so many steps, over one in a bare loop, taken in turn so that drift hits both."""
    starter = ProcessStarter([card], setting.pool(1))
    ours, theirs = Pipe()
    arguments = (setting.directory, setting.device, is_dry_run, theirs)
    process = starter.context.Process(target=bare_loop, args=arguments, daemon=True)  # type: ignore[attr-defined]
    await starter.start(process)
    theirs.close()
    try:
        await asyncio.wait_for(asyncio.to_thread(ours.recv), START_LIMIT_S)
        for side in setting.sides:
            name = f"bare-{side}"
            await tasks.begin(name, side, 0)
            await tasks.run(name, (0,), 1)
            for num_steps in TASK_STEPS:
                bare_s, task_s = [], []
                for _ in range(NUM_TASKS):
                    ours.send((side, num_steps))
                    bare_s.append(await asyncio.wait_for(asyncio.to_thread(ours.recv), ANSWER_LIMIT_S))
                    task_s.append(await tasks.run(name, (0,), num_steps))
                figures = {"bare_ms": median(bare_s, 1e3 / num_steps), "task_ms": median(task_s, 1e3 / num_steps)}
                ratio = median([task / bare for task, bare in zip(task_s, bare_s, strict=True)])
                recording.row(f"{side}, tasks of {num_steps}", **figures, ratio=ratio)
            tasks.end(name)
    finally:
        ours.close()
        await starter.reap()


async def switch(recording: Recording, tasks: Tasks, side: int) -> None:
    """A step at degree 2 that comes from degree 1, beside one that stays; see `benchmarks/execution.py`."""
    stays, switches = [], []
    a, b = f"a-{side}", f"b-{side}"
    await asyncio.gather(tasks.begin(a, side, 0), tasks.begin(b, side, 1))
    for _ in range(1 + NUM_TASKS):
        await asyncio.gather(tasks.run(a, (0,), 1), tasks.run(b, (1,), 1))
        switches.append(await tasks.run(a, (0, 1), 1))
        stays.append(await tasks.run(a, (0, 1), 1))
    tasks.end(a)
    tasks.end(b)
    stay_s, switch_s = statistics.median(stays[1:]), statistics.median(switches[1:])
    recording.row(f"switch to degree 2, {side}", stay_ms=stay_s * 1e3, more_ms=(switch_s - stay_s) * 1e3)


async def kill(recording: Recording, executor: LocalExecutor, tasks: Tasks, side: int) -> None:
    """Rank 1 is killed in the middle of a task that both ranks are at."""
    await tasks.begin("killed", side, 0)
    tasks.joined.clear()
    ended = asyncio.create_task(tasks.outcome("killed", (0, 1), MANY_STEPS))
    await asyncio.sleep(1.0)  # they are at its steps by now
    killed_at = time.perf_counter()
    os.kill(executor.pids[1], signal.SIGKILL)
    end = await ended
    await asyncio.wait_for(tasks.joined.wait(), START_LIMIT_S)
    named = {"lost_s": WorkerLost, "failed_s": TaskFailed, "replaced_s": WorkerJoined}
    figures = {name: tasks.told_at[event] - killed_at for name, event in named.items() if event in tasks.told_at}
    recording.row(f"kill -9, {side}", **figures, task="failed" if isinstance(end, TaskFailed) else "finished")
    await tasks.run("killed", (0, 1), 1)
    recording.row("a task on both ranks after it", right=True)


async def run_tasks(recording: Recording, setting: Setting, *, is_dry_run: bool) -> None:
    card = read_card(setting.directory)
    async with asyncio.timeout(TASKS_LIMIT_S), two_ranks(recording, card, setting) as (executor, tasks):
        await compare_with_bare_loop(recording, card, tasks, setting, is_dry_run=is_dry_run)
        for side in setting.sides:
            await switch(recording, tasks, side)
        await kill(recording, executor, tasks, setting.sides[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "serving")
    parser.add_argument("--model", type=Path, help="directory of the checkpoint, written if it is not there")
    options = parser.parse_args()
    scale = flux.scale_of(options.dry_run)
    recording = begin(options, LIMIT_S)
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(
            directory=options.model or Path(scratch) / "model",
            cache=Path(scratch),
            device="cpu" if options.dry_run else "cuda",
            sides=scale.served,
            num_steps=4 if options.dry_run else 28,
            bench_s=1.0 if options.dry_run else 60.0,
        )
        recording.enter("checkpoint")
        if not (setting.directory / "model_index.json").exists():
            command = [sys.executable, str(Path(flux.__file__)), str(setting.directory)]
            started_at = time.perf_counter()
            subprocess.run([*command, *(["--dry-run"] if options.dry_run else [])], check=True, stdout=sys.stderr)
            recording.row("written", took_s=time.perf_counter() - started_at)
        alone_s: dict[int, float] = {}
        with recording.section("server", 210) as runs:
            if runs:
                alone_s = serve(recording, setting)
        with recording.section("plain server", 150) as runs:
            if runs:
                serve_plain(recording, setting, alone_s)
        with recording.section("tasks", TASKS_LIMIT_S + 10) as runs:
            if runs:
                asyncio.run(run_tasks(recording, setting, is_dry_run=options.dry_run))
    recording.end()


if __name__ == "__main__":
    main()
