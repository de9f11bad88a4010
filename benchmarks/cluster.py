"""What a Ray cluster costs over one machine: `python benchmarks/cluster.py` (needs the extra `ray`, and 2 cores).

It starts a head and two nodes on this machine, and prints two figures of the bundled model at degree 1:
- what a task takes longer through an agent than on the local executor, from its start to the event of its end, beside
  the time that its worker computes; bar: 3 ms at the median
- the throughput of two nodes with one rank each over one machine with two ranks; bar: 0.9
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence

from tetriserve.config import PoolConfig
from tetriserve.core.events import Event, StartTask, TaskFinished, Work
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, image_stages
from tetriserve.executor.cluster import ClusterExecutor
from tetriserve.executor.local import LocalExecutor
from tetriserve.executor.protocol import Executor
from tetriserve.launch import find_model

NUM_STEPS, STEPS_PER_TASK, SIDE = 8, 2, 512


class Driver:
    """Runs tasks on an executor one by one."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self._ids = itertools.count()
        self._ends: dict[int, asyncio.Future[TaskFinished]] = {}
        executor.subscribe(self._on_event)

    def _on_event(self, event: Event) -> None:
        match event:
            case TaskFinished(task_id):
                self._ends.pop(task_id).set_result(event)
            case _:
                raise SystemExit(f"unexpected: {event}")

    def begin(self) -> Work:
        request = Request(
            request_id=f"bench-{next(self._ids)}", prompt="a red circle", shape=Shape(SIDE, SIDE),
            stages=image_stages(NUM_STEPS), seed=1, arrival_s=0.0, deadline_s=1.0,
        )  # fmt: skip
        return Work(request, 0, 0, {})

    async def run(self, work: Work, rank: int) -> tuple[Work, float]:
        """The next task of a request; where it stands then, and the seconds beside its worker's own."""
        trajectory, task_id = work.trajectory, next(self._ids)
        num_steps = 0 if trajectory.is_short else min(STEPS_PER_TASK, trajectory.remaining_steps)
        task = Task((work.request.request_id,), trajectory.stage.kind, (rank,), num_steps)
        end = self._ends[task_id] = asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        self.executor.start_task(StartTask(task_id, task, (work,)))
        finished = await end
        beside_s = time.perf_counter() - started - finished.elapsed_s
        (result,) = finished.results
        after = trajectory.after(result.num_steps, is_stage_over=result.is_stage_over)
        states = {**work.states, task.stage: result.left}
        return Work(work.request, after.stage_index, after.stage_steps_done, states), beside_s

    async def whole(self, rank: int) -> list[float]:
        """One request, from its prompt to its pixels; the seconds beside the worker's of each task."""
        work, beside = self.begin(), []
        while not work.trajectory.is_over:
            work, beside_s = await self.run(work, rank)
            beside.append(beside_s)
        await asyncio.to_thread(self.executor.states.get, work.states[DECODE])
        self.executor.forget(work.request.request_id)
        return beside

    async def throughput(self, ranks: Sequence[int], num_requests: int) -> float:
        """Requests a second, with all `ranks` at work."""
        left = iter(range(num_requests))

        async def serve(rank: int) -> None:
            for _ in left:
                await self.whole(rank)

        started = time.perf_counter()
        await asyncio.gather(*(serve(rank) for rank in ranks))
        return num_requests / (time.perf_counter() - started)


async def measured(new: Callable[[], Executor], num_requests: int) -> tuple[list[float], float]:
    """Milliseconds beside the worker's of each task with one rank at work, and requests a second with two."""
    executor = new()
    await executor.start(lambda text: print(f"  {text}"))
    try:
        driver = Driver(executor)
        for rank in (0, 1):
            await driver.whole(rank)
        beside = [1e3 * each for _ in range(num_requests // 2) for each in await driver.whole(0)]
        return beside, await driver.throughput((0, 1), num_requests)
    finally:
        await executor.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=40)
    num_requests = parser.parse_args().requests
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    from tetriserve.executor.ray import RayFleet

    card = find_model(None)
    print("one machine, two ranks")
    alone = asyncio.run(measured(lambda: LocalExecutor([card], PoolConfig(num_ranks=2)), num_requests))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)

        def on_nodes() -> Executor:
            fleet = RayFleet(cluster.address, [card], PoolConfig(num_ranks=1))
            return ClusterExecutor(fleet, PoolConfig(num_ranks=2, degrees=(1,)), 1)

        print("two nodes, one rank each")
        apart = asyncio.run(measured(on_nodes, num_requests))
    finally:
        cluster.shutdown()
    for name, (beside, per_s) in (("one machine", alone), ("two nodes", apart)):
        quartiles = " / ".join(f"{each:.2f}" for each in statistics.quantiles(beside, n=4))
        print(f"{name}: {quartiles} ms beside a task's own time (quartiles of {len(beside)}), {per_s:.2f} requests/s")
    more_ms = statistics.median(apart[0]) - statistics.median(alone[0])
    print(f"overhead of a task: {more_ms:.2f} ms at the median (bar 3)")
    print(f"throughput of two nodes over one machine: {apart[1] / alone[1]:.3f} (bar 0.9)")


if __name__ == "__main__":
    main()
