"""Requests that share tasks: only where all are of one kind, where it saves GPU time, and at nobody's expense."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetriserve.control.controller import Controller, PolicyError
from tetriserve.control.whatif import forecast
from tetriserve.core.errors import ConfigError
from tetriserve.core.events import (
    Cancelled,
    Command,
    Event,
    FailRequest,
    FailureKind,
    FinishRequest,
    StartTask,
    Submitted,
    TaskFailed,
    TaskFinished,
    TensorRef,
    TimerFired,
    WorkerJoined,
)
from tetriserve.core.plan import Plan, State, Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DENOISE, image_stages
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.batching import sizes_that_pay
from tetriserve.policies.policy import Policy
from tetriserve.policies.registry import make_policy
from tetriserve.profile import ProfileCost
from tetriserve.profile.bundled import open_profile
from tetriserve.simulator.run import simulate

H200 = ProfileCost(open_profile("qwen-image-h200"))
SIDES = (256, 512, 1024)
BATCHING = ("lookahead", "tetriserve", "fcfs:batch=8", "fixed:1:batch=8", "fixed:2:batch=3")
LEFT = TensorRef("left", 1)


def make(spec: str, cost: ProfileCost = H200, num_ranks: int = 4) -> Policy:
    return make_policy(spec, cost, num_ranks=num_ranks, shapes=cost.profile.shapes)


def request_of(name: str, side: int = 512, *, arrival_s: float = 0.0, slo_s: float = 1e6, **rest: object) -> Request:
    return Request(
        request_id=name, prompt="", shape=Shape(side, side), stages=image_stages(20), seed=0, arrival_s=arrival_s,
        deadline_s=arrival_s + slo_s, **rest,  # type: ignore[arg-type]
    )  # fmt: skip


def workload(seed: int, count: int, per_s: float, slo: float) -> list[Request]:
    dice, now, requests = random.Random(seed), 0.0, []
    for number in range(count):
        now += dice.expovariate(per_s)
        side = dice.choice((256, 512, 512, 512, 1024))
        slo_s = slo * dice.uniform(0.8, 1.5) * 20 * H200.times(request_of("", side), image_stages(20)[1])[1]
        stages = image_stages(dice.choice((4, 20, 20)))
        more = {"degrees": (1,)} if dice.random() < 0.1 else {}
        request = request_of(f"r{number}", side, arrival_s=now, slo_s=slo_s, priority=dice.randint(0, 1), **more)
        requests.append(dataclasses.replace(request, stages=stages))
    return requests


class Watched:
    """`policy`, and the tasks that it planned with the kinds of their members."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.tasks: list[tuple[Task, list[Trajectory]]] = []

    def plan(self, state: State, now: float) -> Plan:
        plan = self._policy.plan(state, now)
        waiting = {trajectory.request_id: trajectory for trajectory in state.waiting}
        self.tasks += [(task, [waiting[name] for name in task.members]) for task in plan.tasks]
        return plan


@pytest.mark.parametrize("spec", BATCHING)
@given(seed=st.integers(0, 10_000), per_s=st.sampled_from([0.3, 1.5, 4.0]), slo=st.sampled_from([1.2, 2.5, 6.0]))
@settings(max_examples=8, deadline=None)
def test_members_are_of_one_kind_at_one_stage_and_every_request_ends(
    spec: str, seed: int, per_s: float, slo: float
) -> None:
    policy = Watched(make(spec))
    requests = workload(seed, 40, per_s, slo)
    outcomes = list(simulate(policy, H200, requests, num_ranks=4))
    assert len(outcomes) == len(requests)
    for task, members in policy.tasks:
        assert len({member.request.kind for member in members}) == 1
        assert task.batch == 1 or not any(member.request.is_exact for member in members)
        assert {member.stage.kind for member in members} == {task.stage}
        assert task.num_steps <= min(member.remaining_steps for member in members)
        assert task.batch <= (H200.max_batch if task.stage == DENOISE else 1)
    assert all(outcome.finish_s > outcome.request.arrival_s for outcome in outcomes)


@pytest.mark.parametrize("spec", ["lookahead", "tetriserve"])
@given(seed=st.integers(0, 10_000), slo=st.sampled_from([1.5, 2.5, 4.0]))
@settings(max_examples=12, deadline=None)
def test_who_shares_saves_gpu_time_and_no_more_share_than_pay(spec: str, seed: int, slo: float) -> None:
    policy = Watched(make(spec))
    list(simulate(policy, H200, workload(seed, 40, 3.0, slo), num_ranks=4))
    shared = [(task, members) for task, members in policy.tasks if task.batch > 1]
    for task, members in shared:
        pays = sizes_that_pay(H200, members[0].request, task.degree)
        assert task.batch <= len(pays)
    assert all(members[0].request.shape.height <= 512 for _, members in shared), "1024x1024 gains 2 %"


@pytest.mark.parametrize("spec", ["lookahead", "tetriserve"])
@given(seed=st.integers(0, 10_000), per_s=st.sampled_from([0.1, 0.3]))
@settings(max_examples=12, deadline=None)
def test_where_all_are_in_time_alone_nobody_is_late_for_sharing(spec: str, seed: int, per_s: float) -> None:
    requests = workload(seed, 25, per_s, 4.0)
    alone = {o.request.request_id: o for o in simulate(make(f"{spec}:batching=off"), H200, requests, num_ranks=4)}
    if not all(outcome.is_attained for outcome in alone.values()):
        return
    assert all(outcome.is_attained for outcome in simulate(make(spec), H200, requests, num_ranks=4))


@pytest.mark.parametrize("spec", ["lookahead", "tetriserve"])
def test_under_overload_of_small_images_many_more_are_in_time(spec: str) -> None:
    requests = workload(7, 120, 2.5, 2.5)
    kept = [
        sum(outcome.is_attained for outcome in simulate(make(each), H200, requests, num_ranks=4))
        for each in (spec, f"{spec}:batching=off")
    ]
    assert kept[0] >= kept[1] + 12, kept


@pytest.mark.parametrize("spec", ["lookahead", "tetriserve"])
def test_a_burst_of_best_effort_requests_shares_its_steps(spec: str) -> None:
    policy = Watched(make(spec, num_ranks=1))
    outcomes = list(simulate(policy, H200, [request_of(f"r{i}", slo_s=0.01) for i in range(16)], num_ranks=1))
    steps = [(task.num_steps, task.batch) for task, _ in policy.tasks if task.stage == DENOISE]
    assert sum(num_steps * batch for num_steps, batch in steps) == 16 * 20
    assert sum(num_steps for num_steps, _ in steps) < 16 * 20 / 3, "four or more share a step on average"
    assert max(outcome.finish_s for outcome in outcomes) < 16 * 20 * 0.167 / 2.4


def test_without_measured_batches_plans_are_those_without_batching() -> None:
    rows = tuple(row for row in H200.profile.rows if row.batch == 1)
    single = ProfileCost(dataclasses.replace(H200.profile, rows=rows))
    requests = workload(3, 40, 2.0, 2.5)
    for spec in ("lookahead", "tetriserve"):
        runs = [
            [(o.request.request_id, o.finish_s) for o in simulate(make(each, single), single, requests, num_ranks=4)]
            for each in (spec, f"{spec}:batching=off")
        ]
        assert runs[0] == runs[1]


def test_a_limit_bounds_every_batch() -> None:
    cost = ProfileCost(H200.profile, batch_limit=3)
    for spec in ("lookahead", "tetriserve", "fcfs:batch=8"):
        policy = Watched(make(spec, cost))
        list(simulate(policy, cost, workload(5, 40, 3.0, 1.5), num_ranks=4))
        assert max(task.batch for task, _ in policy.tasks) == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fcfs:batch=0", "policy 'fcfs:batch=0': cannot use 'batch=0'; write fcfs[:batch=N]"),
        ("fcfs:wide", "policy 'fcfs:wide': cannot use 'wide'; write fcfs[:batch=N]"),
        ("fixed:1:batch=x", "policy 'fixed:1:batch=x': cannot use 'batch=x'; write fixed:K[:batch=N]"),
        ("fixed:3:batch=2", "policy 'fixed:3:batch=2': the degree must be one of 1, 2, 4"),
        ("lookahead:batching=2", "policy 'lookahead': cannot use option 'batching=2'; write lookahead["),
    ],
)
def test_a_wrong_batch_is_one_line(spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(spec)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


class Told:
    """Plans what it is told, once."""

    def __init__(self) -> None:
        self.tasks: tuple[Task, ...] = ()

    def plan(self, state: State, now: float) -> Plan:
        tasks, self.tasks = self.tasks, ()
        return Plan(tasks)


class Pool:
    """A controller of four ranks under a told policy, with encoded requests `a`, `b` and `c`, of which c is larger."""

    def __init__(self) -> None:
        self.policy = Told()
        self.controller = Controller(self.policy, H200)
        self.send(*(WorkerJoined(rank) for rank in range(4)))
        for name, side in (("a", 512), ("b", 512), ("c", 1024)):
            self.send(Submitted(request_of(name, side)))
            [start] = self.start(Task((name,), "encode", (0,)))
            self.send(TaskFinished.planned(start, 0.06, LEFT))

    def send(self, *events: Event) -> list[Command]:
        return [command for event in events for command in self.controller.handle(event, 0.0)]

    def start(self, *tasks: Task) -> list[StartTask]:
        self.policy.tasks = tasks
        return [command for command in self.send(TimerFired()) if isinstance(command, StartTask)]


@pytest.mark.parametrize("kind", [FailureKind.STEP, FailureKind.STORE])
def test_a_shared_task_that_fails_fails_nobody_but_is_run_again_apart(kind: FailureKind) -> None:
    pool = Pool()
    [start] = pool.start(Task(("a", "b"), DENOISE, (0,), 2))
    assert pool.send(TaskFailed(start.task_id, kind, "latents are not finite")) == []
    with pytest.raises(PolicyError, match="planned a task for 2 requests; a must be alone"):
        pool.start(Task(("a", "b"), DENOISE, (0,), 2))


def test_the_poison_member_then_fails_alone_and_the_other_goes_on() -> None:
    pool = Pool()
    [start] = pool.start(Task(("a", "b"), DENOISE, (0,), 2))
    pool.send(TaskFailed(start.task_id, FailureKind.STEP, "latents are not finite"))
    first, second = pool.start(Task(("a",), DENOISE, (0,), 2), Task(("b",), DENOISE, (1,), 2))
    failed = pool.send(TaskFailed(first.task_id, FailureKind.STEP, "latents are not finite"))
    assert [command.request.request_id for command in failed if isinstance(command, FailRequest)] == ["a"]
    assert pool.send(TaskFinished.planned(second, 0.3, LEFT)) == []
    [last] = pool.start(Task(("b",), DENOISE, (1,), 18))
    pool.send(TaskFinished.planned(last, 3.0, LEFT))
    [decode] = pool.start(Task(("b",), "decode", (1,)))
    assert any(isinstance(command, FinishRequest) for command in pool.send(TaskFinished.planned(decode, 0.1, LEFT)))


@pytest.mark.parametrize("spec", ["fcfs", *BATCHING])
def test_a_forecast_knows_that_a_shared_task_goes_on_when_one_of_its_members_is_cancelled(spec: str) -> None:
    pool = Pool()
    [start] = pool.start(Task(("a", "b"), DENOISE, (0,), 20))
    end_s = pool.controller.end_s(start.task_id)
    pool.send(Cancelled("a"))
    future = forecast(pool.controller, 0.0, make(spec))
    assert future.finish_s.keys() == {"b", "c"}
    assert [run.task.stage for run in future.runs if run.task.members == ("b",)] == ["decode"]
    assert future.finish_s["b"] >= end_s + 0.05


@pytest.mark.parametrize("spec", ["lookahead", "tetriserve", "fcfs:batch=8", "fixed:1:batch=8"])
def test_policies_leave_alone_who_must_be_alone(spec: str) -> None:
    stages = [Trajectory.at(request_of(f"r{i}", slo_s=0.01), 1, 3) for i in range(8)]
    apart = dataclasses.replace(stages[0], is_apart=True)
    state = State((apart, *stages[1:]), (), (0,), H200)
    members = [task.members for task in make(spec, num_ranks=1).plan(state, 50.0).tasks]
    assert members
    assert all(len(each) == 1 for each in members if "r0" in each)


def test_a_plan_with_members_of_two_kinds_or_too_many_is_one_line() -> None:
    pool = Pool()
    with pytest.raises(PolicyError) as caught:
        pool.start(Task(("a", "c"), DENOISE, (0,), 1))
    assert str(caught.value) == (
        "Told planned one task for a and c, which differ in size, degrees, passes, length of text or LoRA; only "
        "requests of one kind may share a task"
    )
    pool.controller.cost = ProfileCost(H200.profile, batch_limit=1)
    with pytest.raises(PolicyError, match="planned a task for 2 requests; at most 1 may share one"):
        pool.start(Task(("a", "b"), DENOISE, (0,), 1))


def test_the_outcomes_share_of_a_shared_task_is_its_part() -> None:
    outcomes = list(simulate(make("fcfs:batch=8", num_ranks=1), H200, [request_of("a"), request_of("b")], num_ranks=1))
    for outcome in outcomes:
        shared = [run for run in outcome.runs if run.task.batch == 2]
        assert shared
        total_s = sum((run.end_s - run.start_s) * run.task.degree / run.task.batch for run in outcome.runs)
        assert outcome.gpu_time_s == pytest.approx(total_s)


@pytest.mark.parametrize("spec", ["fixed:4", "fixed:4:batch=8", "fcfs", "fcfs:batch=8"])
@pytest.mark.parametrize(("stage_index", "served"), [(0, [("other",)]), (1, [])])
def test_a_request_whose_degrees_the_living_ranks_do_not_allow_waits_and_keeps_its_block_once_it_has_started(
    spec: str, stage_index: int, served: list[tuple[str, ...]]
) -> None:
    request = request_of("wide", 1024, degrees=(4,))
    wide = dataclasses.replace(Trajectory.at(request, stage_index), holders=(0, 1, 2, 3))
    other = Trajectory(request_of("other", 1024))
    plan = make(spec).plan(State((wide, other), (), (0, 1), H200), 0.0)
    assert [task.members for task in plan.tasks] == served
