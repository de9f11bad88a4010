"""A small event loop on a virtual clock that applies plans and checks that the policy kept its contract at each."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import pytest

from tetriserve.core.cluster import ANYWHERE, ONE_NODE, Nodes, StageRanks
from tetriserve.core.cost import task_s
from tetriserve.core.plan import CostModel, InFlight, Plan, State, Task
from tetriserve.core.request import Request, Shape, Stage
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, image_stages
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies import Policy, make_policy
from tetriserve.policies.nodes import within_nodes


@dataclass(frozen=True)
class TableCost:
    """Step and decode times by height, in seconds. Read-only, as all that a policy sees.

    decode: at degree 1, or by degree.
    """

    steps: Mapping[int, Mapping[int, float]]
    decode: Mapping[int, float | Mapping[int, float]]
    encode: float = 0.02
    switch_s: float = 0.001
    move_s: float = 0.0
    move_node_s: float = 0.0
    team_s: float = 0.0
    max_batch: int = 1

    def __post_init__(self) -> None:
        steps = {height: MappingProxyType(dict(times)) for height, times in self.steps.items()}
        object.__setattr__(self, "steps", MappingProxyType(steps))
        decode = {height: MappingProxyType(_by_degree(times)) for height, times in self.decode.items()}
        object.__setattr__(self, "decode", MappingProxyType(decode))

    def times(self, request: Request, stage: Stage, batch: int = 1) -> Mapping[int, float]:
        height = request.shape.height
        return {ENCODE: {1: self.encode}, DECODE: self.decode[height]}.get(stage.kind, self.steps[height])

    def joins_passes(self, request: Request, stage: Stage, degree: int, batch: int) -> bool:
        return False

    def observed(self, task: Task, request: Request, elapsed_s: float) -> CostModel:
        return self

    def duration_s(self, task: Task, request: Request) -> float:
        return self.switch_s + task_s(self, task, request)

    @property
    def shapes(self) -> list[Shape]:
        return [Shape(height, height) for height in self.steps]


def _by_degree(times: float | Mapping[int, float]) -> dict[int, float]:
    return dict(times) if isinstance(times, Mapping) else {1: times}


@dataclass(frozen=True)
class Death:
    """`rank` dies at `time_s` and is replaced at `back_s`."""

    time_s: float
    rank: int
    back_s: float


@dataclass
class Run:
    """How it went: finish times by request, and every task with its start, predicted end and request."""

    finish_s: dict[str, float] = field(default_factory=dict)
    tasks: list[tuple[float, float, Task]] = field(default_factory=list)
    num_plans: int = 0

    def attained(self, requests: Sequence[Request]) -> float:
        return sum(self.finish_s[request.request_id] <= request.deadline_s for request in requests) / len(requests)

    def denoise(self, request_id: str) -> list[Task]:
        return [task for _, _, task in self.tasks if task.members[0] == request_id and task.stage == DENOISE]

    def mean_degree(self, request_id: str) -> float:
        tasks = self.denoise(request_id)
        return sum(task.degree * task.num_steps for task in tasks) / sum(task.num_steps for task in tasks)


def check_plan(plan: Plan, state: State, now: float) -> None:
    """The contract of `Policy.plan`."""
    waiting = {trajectory.request_id: trajectory for trajectory in state.waiting}
    used = [rank for task in plan.tasks for rank in task.ranks]
    assert len(used) == len(set(used)), "a rank runs one task"
    assert set(used) <= set(state.idle_ranks), "only idle living ranks"
    ids = [task.members[0] for task in plan.tasks]
    assert len(ids) == len(set(ids)), "one task per request"
    assert all(state.nodes.share(task.ranks) for task in plan.tasks), "no task spans nodes"
    if state.idle_ranks and not state.in_flight and not plan.tasks:
        assert not [one.request_id for one in state.waiting if state.can_serve(one)], "idle ranks stand still"
    for task in plan.tasks:
        trajectory = waiting[task.members[0]]
        assert state.stage_ranks.allows(trajectory.request.model, task.stage, task.ranks), (
            "only ranks that may run the stage"
        )
        assert task.stage == trajectory.stage.kind, "stages in order"
        assert list(task.ranks) == sorted(task.ranks), "one order per set of ranks"
        assert task.degree in state.cost.times(trajectory.request, trajectory.stage)
        if task.stage == DENOISE:
            assert 1 <= task.num_steps <= trajectory.remaining_steps
        else:
            assert task.num_steps == 0
    assert plan.wake_at is None or plan.wake_at > now, "waking in the past would spin"


def drive_policy(
    policy: Policy,
    requests: Sequence[Request],
    cost: TableCost,
    *,
    num_ranks: int = 8,
    jitter: float = 0.0,
    timer_jitter_s: float = 0.0,
    seed: int = 0,
    deaths: Sequence[Death] = (),
    stage_ranks: StageRanks = ANYWHERE,
    nodes: Nodes = ONE_NODE,
    is_pure_checked: bool = True,
    max_plans: int = 50_000,
) -> Run:
    """Run `requests` to the end. Durations vary by a factor within 1 +- `jitter`, timers by +- `timer_jitter_s`.

    A task that loses a rank fails 50 ms later; its request goes on from where that task began. Fails when events run
    out while a request is unfinished, and when a plan breaks the contract.
    """
    rng = random.Random(seed)
    order = itertools.count()
    heap: list[tuple[float, int, str, object]] = []

    def push(time_s: float, kind: str, value: object) -> None:
        heapq.heappush(heap, (time_s, next(order), kind, value))

    for request in requests:
        push(request.arrival_s, "submit", request)
    for death in deaths:
        push(death.time_s, "death", death.rank)
        push(death.back_s, "join", death.rank)

    run = Run()
    ranks = set(range(num_ranks))
    trajectories: dict[str, Trajectory] = {}
    flights: dict[int, InFlight] = {}
    wake_at: float | None = None
    while heap:
        now, _, kind, value = heapq.heappop(heap)
        if kind == "submit":
            assert isinstance(value, Request)
            trajectories[value.request_id] = Trajectory(value)
        elif kind in ("end", "fail"):
            if value not in flights:
                continue
            task = flights.pop(value).task  # type: ignore[arg-type]
            trajectory = replace(trajectories[task.members[0]], is_running=False)
            if kind == "end":
                is_over = task.num_steps in (0, trajectory.remaining_steps)
                trajectory = replace(trajectory.after(task.num_steps, is_stage_over=is_over), holders=task.ranks)
            trajectories[task.members[0]] = trajectory
            if kind == "end" and task.stage == DECODE:
                assert trajectory.is_over
                assert trajectory.steps_done == trajectory.request.num_steps, "no step skipped or repeated"
                run.finish_s[task.members[0]] = now
                del trajectories[task.members[0]]
        elif kind == "death":
            ranks.discard(value)  # type: ignore[arg-type]
            for request_id, trajectory in trajectories.items():
                holders = tuple(rank for rank in trajectory.holders if rank != value)
                trajectories[request_id] = replace(trajectory, holders=holders)
            for task_id, flight in list(flights.items()):
                if value in flight.task.ranks:
                    heap = [entry for entry in heap if entry[2:] != ("end", task_id)]
                    heapq.heapify(heap)
                    push(now + 0.05, "fail", task_id)
        elif kind == "join":
            ranks.add(value)  # type: ignore[arg-type]
        elif value != wake_at:
            continue

        def snapshot() -> State:
            return State(
                tuple(trajectories.values()), tuple(flights.values()), tuple(sorted(ranks)), cost,
                stage_ranks=stage_ranks, nodes=nodes,
            )  # fmt: skip

        state = snapshot()
        planned = policy.plan(state, now)
        plan = within_nodes(planned, state, now)
        run.num_plans += 1
        assert run.num_plans <= max_plans, "no progress"
        if is_pure_checked:
            assert state == snapshot(), "the state is left as it was"  # its values cannot change: test_contract.py
            assert policy.plan(snapshot(), now) == planned, "equal arguments, equal plans"
        check_plan(plan, state, now)
        for task in plan.tasks:
            request = trajectories[task.members[0]].request
            duration_s = cost.duration_s(task, request)
            task_id = next(order)
            flights[task_id] = InFlight(task_id, task, now, now + duration_s)
            trajectories[task.members[0]] = replace(trajectories[task.members[0]], is_running=True)
            run.tasks.append((now, now + duration_s, task))
            push(now + duration_s * (1 + jitter * rng.uniform(-1, 1)), "end", task_id)
        wake_at = plan.wake_at
        if wake_at is not None:
            push(max(now, wake_at + timer_jitter_s * rng.uniform(-1, 1)), "timer", wake_at)
    assert not trajectories, f"never finished: {sorted(trajectories)}"
    return run


FLUX_STEPS = {
    256: {1: 0.018, 2: 0.0175, 4: 0.018, 8: 0.020},
    512: {1: 0.0423, 2: 0.035, 4: 0.030, 8: 0.029},
    1024: {1: 0.1536, 2: 0.0957, 4: 0.0582, 8: 0.040},
    2048: {1: 0.760, 2: 0.4086, 4: 0.2184, 8: 0.1218},
}
FLUX_DECODE = {256: 0.005, 512: 0.015, 1024: 0.06, 2048: 0.25}
FLUX_DEADLINES = {256: 1.5, 512: 2.0, 1024: 3.0, 2048: 5.0}


@pytest.fixture(scope="session")
def flux() -> TableCost:
    """Times of the size of FLUX.1-dev on 8 H100 GPUs, 28 steps per image. A default round takes 0.61 s."""
    return TableCost(FLUX_STEPS, FLUX_DECODE, team_s=0.778)


@pytest.fixture(scope="session")
def table_cost() -> type[TableCost]:
    return TableCost


@pytest.fixture(scope="session")
def death() -> type[Death]:
    return Death


@pytest.fixture(scope="session")
def drive() -> Callable[..., Run]:
    return drive_policy


@pytest.fixture(scope="session")
def make() -> Callable[..., Policy]:
    def make_for(spec: str, cost: TableCost, num_ranks: int = 8) -> Policy:
        return make_policy(spec, cost, num_ranks=num_ranks, shapes=cost.shapes)

    return make_for


@pytest.fixture(scope="session")
def request_of() -> Callable[..., Request]:
    """A request of `height`, by default with a deadline far away."""

    def build(
        height: int,
        *,
        request_id: str = "r",
        arrival_s: float = 0.0,
        deadline_s: float = 1e6,
        num_steps: int = 28,
        priority: int = 0,
        seed: int = 0,
    ) -> Request:
        return Request(
            request_id=request_id,
            prompt="",
            shape=Shape(height, height),
            stages=image_stages(num_steps),
            seed=seed,
            arrival_s=arrival_s,
            deadline_s=deadline_s,
            priority=priority,
        )

    return build


@pytest.fixture(scope="session")
def poisson(request_of: Callable[..., Request]) -> Callable[..., list[Request]]:
    """Arrivals at `rate_per_min`, sizes uniform (or tilted to large ones), deadlines the paper's times `slo_scale`."""

    def build(
        rate_per_min: float, num_requests: int, *, slo_scale: float = 1.2, seed: int = 0, is_skewed: bool = False
    ) -> list[Request]:
        rng = random.Random(seed)
        heights = list(FLUX_DEADLINES)
        weights = [math.exp((height / 2048) ** 2) if is_skewed else 1.0 for height in heights]
        now = 0.0
        requests = []
        for index in range(num_requests):
            now += rng.expovariate(rate_per_min / 60)
            height = rng.choices(heights, weights)[0]
            deadline_s = now + FLUX_DEADLINES[height] * slo_scale
            requests.append(request_of(height, request_id=f"r{index}", arrival_s=now, deadline_s=deadline_s))
        return requests

    return build
