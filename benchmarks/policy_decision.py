"""How long one decision takes, from 8 ranks with 64 unfinished requests to 1,024 ranks with 10,000.

A controller runs under overload on a virtual clock: step times of FLUX.1-dev on 8 H100, uniform sizes, durations that
vary by 0.7 % so that the cost model changes at every event, and a new request whenever one leaves, so that the queue
keeps its length. Deadlines are the paper's, which makes most of a long queue late, or ten to 300 s, which leaves most
of it in time. Timed are `policy.plan` where ranks are idle (a full pool is answered at once, and would flatter the
figures) and, at the same events, all of `Controller.handle`: state, plan, checks, commands. Seconds are CPU seconds of
this process. Run with

    python benchmarks/policy_decision.py [--pools 8x64 64x1000 1024x10000] [--plot docs/decision_time.png]
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tetriserve.control import Controller
from tetriserve.core.cost import task_s, times_per_step
from tetriserve.core.events import (
    Event,
    FinishRequest,
    StartTask,
    Submitted,
    TaskFinished,
    TensorRef,
    TimerFired,
    WakeAt,
    WorkerJoined,
)
from tetriserve.core.plan import Plan, State, Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.policies import Policy, make_policy
from tetriserve.profile.bundled import open_profile
from tetriserve.profile.cost import ProfileCost
from tetriserve.profile.table import Profile

PROFILE = "flux.1-dev-8xh100"
NUM_STEPS = 28
NOISE = 0.007
"""The largest coefficient of variation of a step in TetriServe's table 1."""
MEAN_GPU_S = 7.5
"""Rank-seconds of a request of these sizes at about the degrees that deadlines ask for."""
PAPER_S = {256: 1.5, 512: 2.0, 1024: 3.0, 1536: 4.0, 2048: 5.0}

BARS_MS = {(8, 64): 1.0, (64, 1000): 10.0, (1024, 10_000): 100.0}
"""p99 by ranks and unfinished requests."""

Deadline = Callable[[random.Random, int], float]
"""Seconds from arrival to deadline of a request of this height."""

DEADLINES: dict[str, Deadline] = {
    "paper's": lambda rng, height: 1.2 * PAPER_S[height],
    "10-300 s": lambda rng, height: rng.uniform(10.0, 300.0),
}


@dataclass(slots=True)
class Timed:
    """A policy that notes how long it takes, where there is something to decide."""

    policy: Policy
    plan_s: list[float] = field(default_factory=list)
    num_waiting: int = 0
    num_in_time: int = 0

    def plan(self, state: State, now: float) -> Plan:
        start_s = time.process_time()
        plan = self.policy.plan(state, now)
        elapsed_s = time.process_time() - start_s
        if state.idle_ranks and state.waiting:
            self.plan_s.append(elapsed_s)
            for trajectory in state.waiting[:: len(state.waiting) // 50 + 1]:
                fastest_s = trajectory.remaining_steps * min(times_per_step(state.cost, trajectory.request).values())
                self.num_waiting += 1
                self.num_in_time += now + fastest_s <= trajectory.request.deadline_s
        return plan


class Overload:
    """A pool of `num_ranks` with `num_requests` unfinished requests at any time.

    They begin as old as the queue of a busy pool makes them: without it, a long queue would all be in time at first.
    """

    def __init__(
        self, spec: str, num_ranks: int, num_requests: int, deadline: Deadline, seed: int, profile: Profile
    ) -> None:
        self._heights = [shape.height for shape in profile.shapes]
        self.cost = ProfileCost(profile)
        self.timed = Timed(make_policy(spec, self.cost, num_ranks=num_ranks, shapes=profile.shapes))
        self.controller = Controller(self.timed, self.cost)
        self.handle_s: list[float] = []
        self._deadline = deadline
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Event]] = []
        self._timer: Event | None = None
        self._ranks: dict[str, tuple[int, ...]] = {}  # of each request's last task
        backlog_s = MEAN_GPU_S * num_requests / num_ranks
        for number in range(num_requests):
            arrival_s = backlog_s * number / num_requests
            self._handle(Submitted(self._request(arrival_s)), arrival_s)
        for rank in range(num_ranks):
            self._handle(WorkerJoined(rank), backlog_s)

    def run_for(self, seconds: float) -> None:
        """Go on for so long on the virtual clock."""
        until_s = self._events[0][0] + seconds
        while self._events[0][0] < until_s:
            self._step()

    def decide(self, num_decisions: int) -> None:
        """Go on until `num_decisions` more have been timed."""
        goal = len(self.handle_s) + num_decisions
        while len(self.handle_s) < goal:
            self._step()

    def _step(self) -> None:
        now, _, event = heapq.heappop(self._events)
        if not isinstance(event, TimerFired) or event is self._timer:
            self._handle(event, now)

    def _handle(self, event: Event, now: float) -> None:
        num_plans = len(self.timed.plan_s)
        start_s = time.process_time()
        commands = self.controller.handle(event, now)
        elapsed_s = time.process_time() - start_s
        if len(self.timed.plan_s) > num_plans:
            self.handle_s.append(elapsed_s)
        for command in commands:
            match command:
                case StartTask():
                    elapsed_s = self._duration_s(command)
                    end_s = now + self._start_s(command.task) + elapsed_s
                    self._schedule(end_s, TaskFinished.planned(command, elapsed_s, _RESULT))
                case WakeAt(time_s):
                    self._timer = TimerFired()
                    self._schedule(time_s, self._timer)
                case FinishRequest(request):
                    del self._ranks[request.request_id]
                    self._schedule(now, Submitted(self._request(now)))

    def _schedule(self, time_s: float, event: Event) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), event))

    def _request(self, now: float) -> Request:
        height = self._random.choice(self._heights)
        return Request(
            request_id=f"r{next(self._numbers)}",
            prompt="",
            shape=Shape(height, height),
            stages=image_stages(NUM_STEPS),
            seed=0,
            arrival_s=now,
            deadline_s=now + self._deadline(self._random, height),
        )

    def _start_s(self, task: Task) -> float:
        is_moved = any(set(self._ranks.get(name, task.ranks)) != set(task.ranks) for name in task.members)
        self._ranks.update(dict.fromkeys(task.members, task.ranks))
        return self.cost.switch_s + (self.cost.move_s if is_moved else 0.0)

    def _duration_s(self, start: StartTask) -> float:
        return task_s(self.cost, start.task, start.work[0].request) * self._random.gauss(1.0, NOISE)


_RESULT = TensorRef("benchmark", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Milliseconds per decision of one policy at one size."""

    policy: str
    deadlines: str
    num_ranks: int
    num_requests: int
    in_time: float
    plan_ms: Sequence[float]
    handle_ms: Sequence[float]

    @property
    def size(self) -> tuple[int, int]:
        return self.num_ranks, self.num_requests

    @property
    def bar_ms(self) -> float | None:
        return BARS_MS.get(self.size)

    def __str__(self) -> str:
        plan = " / ".join(f"{quantile(self.plan_ms, q):7.3f}" for q in (0.5, 0.99, 1.0))
        handle = " / ".join(f"{quantile(self.handle_ms, q):7.3f}" for q in (0.5, 0.99, 1.0))
        verdict = ""
        if self.bar_ms is not None:
            held = quantile(self.handle_ms, 0.99) <= self.bar_ms
            verdict = f"  p99 <= {self.bar_ms:.0f} ms {'held' if held else 'MISSED'}"
        return (
            f"{self.policy:>12} {self.num_ranks:5} {self.num_requests:6}  {self.deadlines:>8} {self.in_time:7.0%}  "
            f"{plan}   {handle}{verdict}"
        )


def quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def measure(spec: str, num_ranks: int, num_requests: int, deadlines: str, options: argparse.Namespace) -> Measured:
    profile = open_profile(options.profile)
    if options.team_s is not None:
        profile = replace(profile, team_s=options.team_s)
    overload = Overload(spec, num_ranks, num_requests, DEADLINES[deadlines], options.seed, profile)
    overload.run_for(options.warm_up)
    timed = overload.timed
    first = len(timed.plan_s)
    overload.decide(options.decisions)
    return Measured(
        policy=spec,
        deadlines=deadlines,
        num_ranks=num_ranks,
        num_requests=num_requests,
        in_time=timed.num_in_time / timed.num_waiting,
        plan_ms=[1e3 * seconds for seconds in timed.plan_s[first:]],
        handle_ms=[1e3 * seconds for seconds in overload.handle_s[first:]],
    )


def plot(results: Sequence[Measured], path: Path) -> None:
    """p50 and p99 of the whole decision against the length of the queue, per policy: the slower of both deadlines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    sizes = sorted({each.size for each in results})
    colours = dict(zip(dict.fromkeys(each.policy for each in results), ("#0072B2", "#D55E00", "#009E73"), strict=False))
    for policy, colour in colours.items():
        for q, style in ((0.99, "o-"), (0.5, "o--")):
            slowest = {
                size: max(quantile(r.handle_ms, q) for r in results if r.policy == policy and r.size == size)
                for size in sizes
            }
            label = f"{policy}, p{100 * q:.0f}"
            axes.plot(
                [size[1] for size in sizes], list(slowest.values()), style, color=colour, label=label, markersize=4
            )
    for (num_ranks, num_requests), bar_ms in BARS_MS.items():
        axes.plot([num_requests / 1.35, num_requests * 1.35], [bar_ms, bar_ms], color="black", linewidth=2.5)
        text = f"bar, {num_ranks:,} ranks"
        axes.annotate(text, (num_requests, bar_ms), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="unfinished requests (ranks)", ylabel="one decision, CPU ms")
    axes.set_xticks([size[1] for size in sizes], [f"{size[1]:,}\n({size[0]:,})" for size in sizes], minor=False)
    axes.minorticks_off()
    axes.margins(y=0.1)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def pool(text: str) -> tuple[int, int]:
    num_ranks, _, num_requests = text.partition("x")
    return int(num_ranks), int(num_requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", nargs="+", default=["tetriserve", "lookahead"])
    parser.add_argument("--pools", nargs="+", type=pool, default=list(BARS_MS), metavar="RANKSxREQUESTS")
    parser.add_argument("--deadlines", nargs="+", choices=DEADLINES, default=list(DEADLINES))
    parser.add_argument("--decisions", type=int, default=1000, help="timed per line")
    parser.add_argument("--warm-up", type=float, default=1.0, help="seconds of the virtual clock before that")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--profile", default=PROFILE, help="qwen-image-h200 has batches")
    parser.add_argument("--team-s", type=float, help="instead of the profile's; 0: any set of ranks will do")
    parser.add_argument("--plot", type=Path, help="PNG of the growth curve")
    options = parser.parse_args()
    print(f"{'policy':>12} {'ranks':>5} {'queue':>6}  {'deadline':>8} {'in time':>7}  plan p50 / p99 / max, ms", end="")
    print("       handle p50 / p99 / max, ms")
    results = []
    for spec, (num_ranks, num_requests), deadlines in itertools.product(
        options.policies, options.pools, options.deadlines
    ):
        results.append(measure(spec, num_ranks, num_requests, deadlines, options))
        print(results[-1], flush=True)
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
