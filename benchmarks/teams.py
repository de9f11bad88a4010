"""What working together costs ranks: ratios and times measured in one run of the bundled model (no GPU needed).

Prints, for exchanges through shared memory and through gloo in turn: a step at degree 2 over one at degree 1, by size;
an exchange of 64 KB between two ranks; and how much longer a step takes after a switch from degree 1 to 2 than after a
step at degree 2.

    python benchmarks/teams.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from tetriserve.config import COLLECTIVES, PoolConfig
from tetriserve.core.events import Event, StartTask, TaskFinished, Work
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DENOISE, ENCODE, image_stages
from tetriserve.executor.local import LocalExecutor
from tetriserve.launch import find_model
from tetriserve.models.card import ModelCard
from tetriserve.worker.team import SLOT_BYTES, Region

STEPS = {Shape(256, 256): 8, Shape(512, 512): 3, Shape(1024, 1024): 1}
"""Of each task, by size."""
STEP_BARS = {Shape(256, 256): 0.80, Shape(512, 512): 0.64, Shape(1024, 1024): 0.60}
EXCHANGE_BYTES, EXCHANGE_BAR = 2**16, 1 / 3
NUM_EXCHANGES = 400
SWITCH_BAR_S = 0.0003
BOTH = (0, 1)


@dataclass
class Pool:
    """Two ranks, and one request of each size to step through."""

    executor: LocalExecutor
    _ends: dict[int, asyncio.Future[TaskFinished]] = field(default_factory=dict)
    _works: dict[str, Work] = field(default_factory=dict)
    _ids: itertools.count[int] = field(default_factory=itertools.count)

    async def start(self) -> None:
        await self.executor.start(lambda text: None)
        self.executor.subscribe(self._on_event)
        for name, shape in [(str(shape), shape) for shape in STEPS] + [("other", Shape(256, 256))]:
            request = Request(
                request_id=name, prompt=name, shape=shape, stages=image_stages(10_000), seed=0, arrival_s=0.0,
                deadline_s=0.0,
            )  # fmt: skip
            self._works[name] = Work(request, 0, 0, {})
            await self.run(name, ENCODE, (0,))

    async def run(self, name: str, stage: str, ranks: tuple[int, ...], num_steps: int = 0) -> tuple[float, float]:
        """Seconds in the leader, and from the order to the answer."""
        task_id, work = next(self._ids), self._works[name]
        end = self._ends[task_id] = asyncio.get_running_loop().create_future()
        started_at = time.perf_counter()
        self.executor.start_task(StartTask(task_id, Task((name,), stage, ranks, num_steps), (work,)))
        finished = await end
        elapsed_s = time.perf_counter() - started_at
        (result,) = finished.results
        after = work.trajectory.after(result.num_steps, is_stage_over=result.is_stage_over)
        states = {**work.states, stage: result.left}
        self._works[name] = Work(work.request, after.stage_index, after.stage_steps_done, states)
        return finished.elapsed_s, elapsed_s

    async def step_s(self, shape: Shape, ranks: tuple[int, ...]) -> float:
        """Of a step after a first one, which may have to fetch its latents."""
        await self.run(str(shape), DENOISE, ranks, 1)
        return (await self.run(str(shape), DENOISE, ranks, STEPS[shape]))[0] / STEPS[shape]

    async def switch_s(self) -> float:
        """How much longer a step takes that comes from degree 1 than one that stays at degree 2.

        At degree 1 the request runs on rank 0 beside another on rank 1, so that rank 1 lacks its latents afterwards.
        """
        name = str(Shape(256, 256))
        await asyncio.gather(self.run(name, DENOISE, (0,), 1), self.run("other", DENOISE, (1,), 1))
        switch_s = (await self.run(name, DENOISE, BOTH, 1))[1]
        return switch_s - (await self.run(name, DENOISE, BOTH, 1))[1]

    def _on_event(self, event: Event) -> None:
        assert isinstance(event, TaskFinished), event
        self._ends.pop(event.task_id).set_result(event)


@dataclass
class Times:
    """Of one kind of collectives. step_s: by size and degree."""

    step_s: dict[tuple[Shape, int], list[float]] = field(default_factory=dict)
    switch_s: list[float] = field(default_factory=list)

    def ratio(self, shape: Shape) -> float:
        return statistics.median(self.step_s[shape, 2]) / statistics.median(self.step_s[shape, 1])


async def through_executors(card: ModelCard, num_rounds: int) -> dict[str, Times]:
    """Both kinds in turn, twice, so that drift hits both; only the workers of one are there at a time."""
    times = {kind: Times() for kind in COLLECTIVES}
    for kind in (*COLLECTIVES, *COLLECTIVES):
        pool = Pool(LocalExecutor([card], PoolConfig(num_ranks=2, collectives=kind)))
        try:
            await pool.start()
            for number in range(-1, num_rounds):  # one round of warm-up
                for shape, ranks in itertools.product(STEPS, ((0,), BOTH)):
                    step_s = await pool.step_s(shape, ranks)
                    if number >= 0:
                        times[kind].step_s.setdefault((shape, len(ranks)), []).append(step_s)
            times[kind].switch_s += [await pool.switch_s() for _ in range(10 * num_rounds)]
        finally:
            await pool.executor.stop()
    return times


def exchange_all(kind: str, region: Region, rank: int, directory: Path, end: Connection) -> None:
    """A process that exchanges over and over with its peer; seconds of each exchange."""
    import torch

    from tetriserve.worker.team.groups import GroupTeam
    from tetriserve.worker.team.shm import ShmTeam

    torch.set_num_threads(1)
    team = ShmTeam(region, rank) if kind == "shm" else GroupTeam(region, rank, "gloo", directory, 60.0, 1)
    team.enter(BOTH, 1)
    part = torch.ones(1, EXCHANGE_BYTES // 8)  # two parts of float32
    received = [torch.empty_like(part) for _ in BOTH]
    exchange_s = []
    for _ in range(NUM_EXCHANGES):
        started_at = time.perf_counter()
        team.exchange([part, part], received, part.nbytes)
        exchange_s.append(time.perf_counter() - started_at)
    end.send(exchange_s[NUM_EXCHANGES // 4 :])
    end.recv()


def exchange_s(kind: str) -> float:
    context = multiprocessing.get_context("spawn")
    region = Region(2, SLOT_BYTES)
    with tempfile.TemporaryDirectory() as directory:
        ends, processes = [], []
        for rank in BOTH:
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=exchange_all, args=(kind, region, rank, Path(directory), theirs)))
            processes[-1].start()
            ends.append(ours)
        try:
            exchange_s: list[float] = ends[0].recv()
            return statistics.median(exchange_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
            region.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of each kind and size, in each of two turns")
    arguments = parser.parse_args()
    times = asyncio.run(through_executors(find_model(None), arguments.rounds))
    shm, gloo = times["shm"], times["torch"]
    for shape, bar in STEP_BARS.items():
        alone, together = (1000 * statistics.median(shm.step_s[shape, degree]) for degree in (1, 2))
        over = statistics.median(shm.step_s[shape, 2]) / statistics.median(gloo.step_s[shape, 2])
        print(
            f"{shape}: a step at degree 2 over degree 1: shm {shm.ratio(shape):.2f}x (bar {bar:.2f}; {together:.1f} "
            f"over {alone:.1f} ms), gloo {gloo.ratio(shape):.2f}x; shm over gloo {over:.2f}x"
        )
    shm_s, gloo_s = exchange_s("shm"), exchange_s("torch")
    print(
        f"an exchange of {EXCHANGE_BYTES // 1024} KB: shm {shm_s * 1e6:.0f} us, gloo {gloo_s * 1e6:.0f} us, "
        f"{shm_s / gloo_s:.2f}x (bar {EXCHANGE_BAR:.2f})"
    )
    for kind, each in times.items():
        print(
            f"a switch from degree 1 to 2, {kind}: {1000 * statistics.median(each.switch_s):.2f} ms more than a task "
            f"that stays (bar {1000 * SWITCH_BAR_S:.1f} ms)"
        )


if __name__ == "__main__":
    main()
