"""How long one decision takes: p50, p99 and max of `plan` at 8 ranks with 64 unfinished requests.

The states come from a running loop at overload (a virtual clock, step times of the size of FLUX.1-dev on 8 H100), the
number of unfinished requests held at 64 by admitting a new one whenever one leaves. Run with

    python benchmarks/policy_decision.py [--policies tetriserve lookahead] [--plans 4000]
"""

from __future__ import annotations

import argparse
import gc
import heapq
import itertools
import random
import time
from collections.abc import Iterator

from tetriserve.core.plan import CostModel, InFlight, State
from tetriserve.core.request import Request, Shape
from tetriserve.core.trajectory import Stage, Trajectory
from tetriserve.policies import make_policy

NUM_RANKS = 8
NUM_REQUESTS = 64
BAR_P99_MS = 1.0

STEP_TIMES = {
    256: {1: 0.018, 2: 0.0175, 4: 0.018, 8: 0.020},
    512: {1: 0.0423, 2: 0.035, 4: 0.030, 8: 0.029},
    1024: {1: 0.1536, 2: 0.0957, 4: 0.0582, 8: 0.040},
    2048: {1: 0.760, 2: 0.4086, 4: 0.2184, 8: 0.1218},
}
DECODE_S = {256: 0.005, 512: 0.015, 1024: 0.06, 2048: 0.25}


class TableCost:
    switch_s = 0.001

    def step_times(self, request: Request) -> dict[int, float]:
        return STEP_TIMES[request.shape.height]

    def encode_s(self, request: Request) -> float:
        return 0.02

    def decode_s(self, request: Request) -> float:
        return DECODE_S[request.shape.height]

    def observed(self, request: Request, degree: int, step_s: float) -> CostModel:
        return self


def new_requests(rng: random.Random, slack: float) -> Iterator[tuple[Shape, float]]:
    """Shapes with deadlines from tight to `slack` times the time that the queue needs, so that both kinds wait."""
    while True:
        size = rng.choice(list(STEP_TIMES))
        yield Shape(size, size), rng.uniform(2.0, slack)


def measure(spec: str, num_plans: int, slack: float, seed: int) -> tuple[list[float], float]:
    """Seconds per plan, and the mean share of waiting requests that could still meet their deadline."""
    rng = random.Random(seed)
    cost = TableCost()
    policy = make_policy(spec, cost, num_ranks=NUM_RANKS, shapes=[Shape(size, size) for size in STEP_TIMES])
    fresh = new_requests(rng, slack)
    ids = itertools.count()
    order = itertools.count()
    trajectories: dict[str, Trajectory] = {}
    flights: dict[int, InFlight] = {}
    heap: list[tuple[float, int, int | None]] = [(0.0, next(order), None)]
    wake_at: float | None = 0.0
    seconds: list[float] = []
    num_feasible = num_waiting = 0
    while len(seconds) < num_plans:
        now, _, task_id = heapq.heappop(heap)
        if task_id is None and now != wake_at:
            continue
        if task_id is not None:
            task = flights.pop(task_id).task
            done = trajectories.pop(task.request_id)
            if task.stage is not Stage.DECODE:
                trajectories[task.request_id] = Trajectory(
                    done.request, True, done.steps_done + task.num_steps, holders=task.ranks
                )
        while len(trajectories) < NUM_REQUESTS:
            shape, deadline_s = next(fresh)
            request_id = f"r{next(ids)}"
            trajectories[request_id] = Trajectory(
                Request(
                    request_id=request_id,
                    prompt="",
                    shape=shape,
                    num_steps=28,
                    seed=0,
                    arrival_s=now,
                    deadline_s=now + deadline_s,
                )
            )
        state = State(tuple(trajectories.values()), tuple(flights.values()), tuple(range(NUM_RANKS)), cost)
        gc.disable()
        start = time.perf_counter()
        plan = policy.plan(state, now)
        elapsed_s = time.perf_counter() - start
        gc.enable()
        if state.idle_ranks:  # a full pool is answered at once, and would flatter the figures
            seconds.append(elapsed_s)
        for trajectory in state.waiting:
            fastest_s = min(cost.step_times(trajectory.request).values())
            num_waiting += 1
            num_feasible += now + trajectory.remaining_steps * fastest_s <= trajectory.request.deadline_s
        for task in plan.tasks:
            trajectory = trajectories[task.request_id]
            request = trajectory.request
            duration_s = {
                Stage.ENCODE: cost.encode_s(request),
                Stage.DENOISE: task.num_steps * cost.step_times(request)[task.degree],
                Stage.DECODE: cost.decode_s(request),
            }[task.stage]
            end_s = now + cost.switch_s + duration_s
            flight = InFlight(next(order), task, now, end_s)
            flights[flight.task_id] = flight
            trajectories[task.request_id] = Trajectory(
                request, trajectory.is_encoded, trajectory.steps_done, trajectory.holders, is_running=True
            )
            heapq.heappush(heap, (end_s * (1 + rng.uniform(-1e-4, 1e-4)), next(order), flight.task_id))
        wake_at = plan.wake_at
        if wake_at is not None:
            heapq.heappush(heap, (wake_at, next(order), None))
    return seconds, num_feasible / num_waiting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", nargs="+", default=["tetriserve", "lookahead"])
    parser.add_argument("--plans", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for spec, slack in itertools.product(options.policies, (6.0, 60.0, 240.0)):
        seconds, feasible = measure(spec, options.plans, slack, options.seed)
        ms = sorted(1e3 * value for value in seconds)
        p50, p99 = ms[len(ms) // 2], ms[int(0.99 * len(ms))]
        print(
            f"{spec}, {NUM_RANKS} ranks, {NUM_REQUESTS} requests, deadlines of 2 to {slack:.0f} s "
            f"({feasible:.0%} of the waiting on time): p50 {p50:.3f} ms, p99 {p99:.3f} ms, max {ms[-1]:.3f} ms; "
            f"bar p99 <= {BAR_P99_MS:.1f} ms: {'held' if p99 <= BAR_P99_MS else 'MISSED'}"
        )


if __name__ == "__main__":
    main()
