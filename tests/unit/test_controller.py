"""The controller alone: events in, commands out, driven by scripted policies and by a small random pool of ranks."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetriserve.control import Controller
from tetriserve.control.controller import PolicyError
from tetriserve.core.events import (
    Cancelled,
    Checkpoint,
    CloseCancelled,
    Command,
    Event,
    FailRequest,
    FailureKind,
    FinishRequest,
    ForgetRequest,
    Output,
    Result,
    Run,
    StartTask,
    Submitted,
    TaskFailed,
    TaskFinished,
    TensorRef,
    TextCount,
    TimerFired,
    WakeAt,
    Work,
    WorkerJoined,
    WorkerLost,
)
from tetriserve.core.execution import Execution
from tetriserve.core.plan import LATELY_S, Plan, State, Task
from tetriserve.core.request import RAW_PIXELS, Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, image_stages
from tetriserve.policies.policy import Policy
from tetriserve.policies.registry import make_policy
from tetriserve.profile import Profile, ProfileCost, Row

STEP_S = {256: {1: 0.1, 2: 0.06, 4: 0.04}, 512: {1: 0.4, 2: 0.22, 4: 0.13}}
DECODE_S = {256: 0.2, 512: 0.8}
COST = ProfileCost(
    Profile(
        model="m",
        hardware="h",
        execution=Execution("float32"),
        source="s",
        created="c",
        switch_s=0.001,
        rows=(
            Row(stage=ENCODE, seconds=0.02),
            *(
                Row(stage=DENOISE, height=side, width=side, tokens=side * side // 1024, degree=degree, seconds=step_s)
                for side, times in STEP_S.items()
                for degree, step_s in times.items()
            ),
            *(Row(stage=DECODE, height=side, width=side, seconds=seconds) for side, seconds in DECODE_S.items()),
            Row(stage=DENOISE, height=256, width=256, tokens=64, batch=8, seconds=0.8),  # no quicker than one by one
        ),
    )
)


def make_request(request_id: str = "a", side: int = 256, num_steps: int = 4, deadline_s: float = 10.0) -> Request:
    return Request(
        request_id=request_id,
        prompt=f"prompt of {request_id}",
        shape=Shape(side, side),
        stages=image_stages(num_steps),
        seed=0,
        arrival_s=0.0,
        deadline_s=deadline_s,
    )


class Script:
    """A policy that plans what it was told to, once."""

    def __init__(self) -> None:
        self.next = Plan()
        self.seen: list[tuple[State, float]] = []

    def plan(self, state: State, now: float) -> Plan:
        self.seen.append((state, now))
        plan, self.next = self.next, Plan()
        return plan


class Bench:
    """A controller with a scripted policy, one request `a` submitted, and four ranks."""

    def __init__(self, *, max_losses: int = 3) -> None:
        self.policy = Script()
        self.controller = Controller(self.policy, COST, max_losses=max_losses)
        for rank in range(4):
            assert self.send(WorkerJoined(rank)) == []
        self.request = make_request()
        assert self.send(Submitted(self.request)) == []

    def send(self, event: Event, now: float = 0.0, *, plan: Iterable[Task] = ()) -> list[Command]:
        self.policy.next = Plan(tuple(plan))
        return self.controller.handle(event, now)

    def start(self, *tasks: Task, now: float = 0.0) -> StartTask:
        """Plan tasks at a timer; the last one's command."""
        commands = self.send(TimerFired(), now, plan=tasks)
        assert [type(command) for command in commands] == [StartTask] * len(tasks)
        last = commands[-1]
        assert isinstance(last, StartTask)
        return last

    def encoded(self, elapsed_s: float = 0.02) -> TensorRef:
        """Carry `a` past encode."""
        start, ref = self.start(Task(("a",), ENCODE, (0,))), TensorRef("a.encode", 10)
        assert self.send(TaskFinished.planned(start, elapsed_s, ref)) == []
        return ref

    def denoised(self, num_steps: int, *ranks: int) -> TensorRef:
        """Carry `a` `num_steps` steps further."""
        start = self.start(Task(("a",), DENOISE, ranks, num_steps))
        ref = TensorRef(f"a.denoise.{start.work[0].steps_done + num_steps}", 20)
        assert self.send(TaskFinished.planned(start, 0.1, ref)) == []
        return ref


def test_a_request_passes_encode_denoise_and_decode_with_exactly_the_references_that_tasks_left() -> None:
    bench = Bench()
    embeds, latents, pixels = (TensorRef(key, 1) for key in ("e", "l", "p"))
    encode = Task(("a",), ENCODE, (2,))
    first, second = Task(("a",), DENOISE, (0, 1), 3), Task(("a",), DENOISE, (3,), 1)
    decode = Task(("a",), DECODE, (3,))

    def work(stage_index: int, steps_done: int, **states: TensorRef) -> tuple[Work, ...]:
        return (Work(bench.request, stage_index, steps_done, states),)

    text = TextCount(5, is_truncated=False)
    assert bench.send(TimerFired(), 1.0, plan=[encode]) == [StartTask(0, encode, work(0, 0))]
    encoded = TaskFinished(0, 0.02, (Result(embeds, 0, is_stage_over=True, text=text),))
    assert bench.send(encoded, 2.0, plan=[first]) == [StartTask(1, first, work(1, 0, encode=embeds))]
    begun = TaskFinished(1, 0.2, (Result(latents, 3, is_stage_over=False),))
    assert bench.send(begun, 3.0, plan=[second]) == [StartTask(2, second, work(1, 3, encode=embeds, denoise=latents))]
    final = TensorRef("l2", 1)
    denoised = TaskFinished(2, 0.1, (Result(final, 1, is_stage_over=True),))
    assert bench.send(denoised, 4.0, plan=[decode]) == [StartTask(3, decode, work(2, 0, encode=embeds, denoise=final))]
    runs = (Run(encode, 1.0, 2.0, text), Run(first, 2.0, 3.0), Run(second, 3.0, 4.0), Run(decode, 4.0, 5.0))
    predicted_finish_s = 0.02 + 4 * 0.04 + 0.2
    finish, forget = bench.send(TaskFinished(3, 0.2, (Result(pixels, 0, is_stage_over=True),)), 5.0)
    assert isinstance(finish, FinishRequest)
    assert finish.predicted_finish_s == pytest.approx(predicted_finish_s)
    assert dataclasses.replace(finish, predicted_finish_s=0.0) == FinishRequest(
        bench.request, runs, 0.0, Output(pixels, RAW_PIXELS)
    )
    assert forget == ForgetRequest("a")
    assert bench.controller.state == State((), (), (0, 1, 2, 3), bench.controller.cost, lately=(bench.request,))


def test_a_request_with_a_checkpoint_goes_on_from_there_and_its_history_is_whole() -> None:
    bench = Bench()
    embeds, latents, pixels = (TensorRef(key, 1) for key in ("b.encode", "b.denoise.3", "p"))
    before = (Run(Task(("b",), ENCODE, (0,)), -3.0, -2.9), Run(Task(("b",), DENOISE, (0, 1), 3), -2.9, -2.0))
    request = make_request("b")
    states = {ENCODE: embeds, DENOISE: latents}
    bench.send(Submitted(request, None, Checkpoint(1, 3, states, before)), 1.0)
    last, decode = Task(("b",), DENOISE, (3,), 1), Task(("b",), DECODE, (3,))
    assert bench.send(TimerFired(), 1.0, plan=[last]) == [StartTask(0, last, (Work(request, 1, 3, states),))]
    after = TensorRef("b.denoise.4", 1)
    (start,) = bench.send(TaskFinished(0, 0.1, (Result(after, 1, is_stage_over=True),)), 1.2, plan=[decode])
    assert start == StartTask(1, decode, (Work(request, 2, 0, {**states, DENOISE: after}),))
    finish, _ = bench.send(TaskFinished.planned(start, 0.1, pixels), 1.4)
    assert isinstance(finish, FinishRequest)
    assert finish.output == Output(pixels, RAW_PIXELS)
    assert finish.runs == (*before, Run(last, 1.0, 1.2), Run(decode, 1.2, 1.4))


def test_a_checkpoint_after_the_last_step_leaves_the_decoding() -> None:
    bench = Bench()
    states = {ENCODE: TensorRef("b.encode", 1), DENOISE: TensorRef("b.denoise.4", 1)}
    request = make_request("b")
    bench.send(Submitted(request, None, Checkpoint(2, 0, states, ())))
    assert bench.start(Task(("b",), DECODE, (1,))).work == (Work(request, 2, 0, states),)


def test_a_policy_sees_stage_holders_and_the_predicted_end_of_what_runs() -> None:
    bench = Bench()
    bench.encoded()
    start = bench.start(Task(("a",), DENOISE, (1, 3), 2), now=7.0)
    state = bench.controller.state
    (flight,) = state.in_flight
    assert (flight.start_s, flight.end_s) == (7.0, pytest.approx(7.0 + 0.001 + 2 * 0.06))
    assert (state.idle_ranks, state.waiting) == ((0, 2), ())
    assert state.trajectories[0].is_running
    assert state.trajectories[0].holders == (0,)
    assert (state.flights, flight.task_id) == ({"a": flight}, start.task_id)
    bench.send(TaskFinished.planned(start, 0.12, TensorRef("l", 1)), 8.0)
    state, now = bench.policy.seen[-1]
    assert now == 8.0
    assert (state.idle_ranks, state.in_flight) == ((0, 1, 2, 3), ())
    (trajectory,) = state.waiting
    assert (trajectory.stage.kind, trajectory.remaining_steps, trajectory.holders) == (DENOISE, 2, (1, 3))


def test_a_policy_sees_what_kinds_of_requests_came_in_the_last_minute() -> None:
    bench = Bench()
    again, large = make_request("b"), make_request("c", side=512)
    bench.send(Cancelled("a"), 1.0)
    assert bench.controller.state.lately == (bench.request,)
    bench.send(Submitted(large), 2.0)
    bench.send(Submitted(again), 3.0)
    assert bench.controller.state.lately == (large, again)
    forked = bench.controller.fork(Script())
    bench.send(TimerFired(), 2.0 + LATELY_S)
    assert bench.controller.state.lately == (large, again)
    bench.send(TimerFired(), 2.1 + LATELY_S)
    assert bench.controller.state.lately == (again,)
    bench.send(TimerFired(), 3.1 + LATELY_S)
    assert bench.controller.state.lately == ()
    assert forked.state.lately == (large, again)


def test_the_policy_is_asked_at_every_event_and_its_wish_to_wake_is_forwarded() -> None:
    bench = Bench()
    num_asked = len(bench.policy.seen)
    for event in (TimerFired(), Cancelled("nobody"), WorkerLost(0, "died"), WorkerJoined(0)):
        bench.policy.next = Plan(wake_at=12.5)
        assert bench.controller.handle(event, 1.0) == [WakeAt(12.5)]
    assert len(bench.policy.seen) == num_asked + 4
    assert bench.send(TimerFired(), 2.0) == []


def test_finished_steps_correct_the_cost_that_policies_plan_with() -> None:
    bench = Bench()
    bench.encoded()
    start = bench.start(Task(("a",), DENOISE, (0,), 2))
    bench.send(TaskFinished.planned(start, 2 * 0.2, TensorRef("l", 1)))
    cost = bench.policy.seen[-1][0].cost
    assert cost.times(bench.request, bench.request.stage_of(DENOISE))[1] == pytest.approx(0.1 * 1.2)
    assert COST.times(bench.request, bench.request.stage_of(DENOISE))[1] == 0.1


def test_finished_encodes_and_decodes_correct_it_too() -> None:
    bench = Bench()
    bench.encoded(elapsed_s=0.04)
    for _ in range(4):
        start = bench.start(Task(("a",), DENOISE, (0,), 1))
        bench.send(TaskFinished.planned(start, 0.1, TensorRef("l", 1)))
    start = bench.start(Task(("a",), DECODE, (0,)))
    bench.send(TaskFinished.planned(start, 0.1, TensorRef("p", 1)))
    cost = bench.controller.cost
    assert cost.times(bench.request, bench.request.stage_of(ENCODE))[1] == pytest.approx(0.02 * 1.2)
    assert cost.times(bench.request, bench.request.stage_of(DECODE))[1] == pytest.approx(0.2 * 0.9)
    assert cost.times(bench.request, bench.request.stage_of(DENOISE))[1] == 0.1


def assert_closed(commands: list[Command], stages: list[str]) -> None:
    """The request is closed once, with the tasks that ran for it, and then forgotten."""
    close, forget = commands
    assert isinstance(close, CloseCancelled)
    assert [run.task.stage for run in close.runs] == stages
    assert forget == ForgetRequest("a")


def test_a_request_cancelled_before_it_starts_is_forgotten_at_once() -> None:
    bench = Bench()
    assert_closed(bench.send(Cancelled("a")), [])
    assert bench.controller.state.trajectories == ()
    assert bench.send(Cancelled("a")) == []


def test_a_request_cancelled_between_tasks_is_forgotten_at_once() -> None:
    bench = Bench()
    bench.encoded()
    assert_closed(bench.send(Cancelled("a")), [ENCODE])


@pytest.mark.parametrize("is_lost", [None, True, False])
def test_a_running_request_that_is_cancelled_keeps_its_ranks_until_its_task_ends(is_lost: bool | None) -> None:
    bench = Bench()
    bench.encoded()
    start = bench.start(Task(("a",), DENOISE, (0, 1), 2))
    assert bench.send(Cancelled("a")) == []
    assert bench.send(Cancelled("a")) == []
    state = bench.controller.state
    assert (state.trajectories, state.idle_ranks) == ((), (2, 3))
    end: Event = TaskFinished.planned(start, 0.1, TensorRef("l", 1))
    if is_lost is not None:
        end = TaskFailed(start.task_id, FailureKind.LOST if is_lost else FailureKind.STEP, "broken")
    assert_closed(bench.send(end), [ENCODE] if is_lost is not None else [ENCODE, DENOISE])
    assert bench.controller.state.idle_ranks == (0, 1, 2, 3)


def test_a_request_cancelled_during_decode_finishes_nothing() -> None:
    bench = Bench()
    bench.encoded()
    bench.denoised(4, 0)
    start = bench.start(Task(("a",), DECODE, (0,)))
    bench.send(Cancelled("a"))
    closed = bench.send(TaskFinished.planned(start, 0.1, TensorRef("p", 1)))
    assert_closed(closed, [ENCODE, DENOISE, DECODE])


def test_cancelling_somebody_unknown_or_finished_does_nothing() -> None:
    bench = Bench()
    before = bench.controller.state
    assert bench.send(Cancelled("nobody")) == []
    assert bench.controller.state == before


def test_a_step_that_fails_ends_that_request_alone() -> None:
    bench = Bench()
    bench.encoded()
    other = make_request("b")
    bench.send(Submitted(other))
    start = bench.start(Task(("b",), ENCODE, (2,)), Task(("a",), DENOISE, (0, 1), 2))
    fail, forget = bench.send(TaskFailed(start.task_id, FailureKind.STEP, "out of memory"), 3.0)
    assert isinstance(fail, FailRequest)
    assert (fail.request, fail.message) == (bench.request, "out of memory")
    assert [run.task.stage for run in fail.runs] == [ENCODE]
    assert forget == ForgetRequest("a")
    state = bench.controller.state
    assert [trajectory.request_id for trajectory in state.trajectories] == ["b"]
    assert state.idle_ranks == (0, 1, 3)


def test_a_lost_task_is_done_again_from_the_last_finished_step_before_the_policy_is_asked() -> None:
    bench = Bench()
    embeds = bench.encoded()
    latents = bench.denoised(2, 0, 1)
    lost = bench.start(Task(("a",), DENOISE, (0, 1), 2))
    bench.send(Submitted(make_request("b")))
    assert bench.send(WorkerLost(1, "killed")) == []
    encode_b = Task(("b",), ENCODE, (3,))
    again, other = bench.send(TaskFailed(lost.task_id, FailureKind.LOST, "rank 1 died"), plan=[encode_b])
    assert again == StartTask(
        lost.task_id + 1,
        Task(("a",), DENOISE, (0, 2), 1),  # rank 0 still holds the state
        (Work(bench.request, 1, 2, {ENCODE: embeds, DENOISE: latents}),),
    )
    assert isinstance(other, StartTask)
    assert other.task == encode_b
    seen, _ = bench.policy.seen[-1]
    assert [trajectory.request_id for trajectory in seen.waiting] == ["b"]
    assert seen.idle_ranks == (3,)


def test_what_follows_a_lost_task_that_was_done_again_is_the_policys() -> None:
    bench = Bench()
    bench.encoded()
    lost = bench.start(Task(("a",), DENOISE, (0,), 2))
    (again,) = bench.send(TaskFailed(lost.task_id, FailureKind.LOST, "rank 0 hung"))
    assert isinstance(again, StartTask)
    assert bench.send(TaskFinished.planned(again, 0.1, TensorRef("a.denoise.1", 20))) == []


def test_lost_tasks_go_first_on_as_many_ranks_as_are_idle() -> None:
    bench = Bench()
    bench.encoded()
    wide = bench.start(Task(("a",), DENOISE, (0, 1, 2, 3), 1))
    for rank in range(1, 4):
        bench.send(WorkerLost(rank, "killed"))
    (narrow,) = bench.send(TaskFailed(wide.task_id, FailureKind.LOST, "they died"))
    assert isinstance(narrow, StartTask)
    assert narrow.task == Task(("a",), DENOISE, (0,), 1)
    bench.send(WorkerLost(0, "killed"))
    assert bench.send(TaskFailed(narrow.task_id, FailureKind.LOST, "it died")) == []
    bench.send(Submitted(make_request("b")))
    (first,) = bench.send(WorkerJoined(2))
    assert isinstance(first, StartTask)
    assert first.task == Task(("a",), DENOISE, (2,), 1)


@pytest.mark.parametrize("max_losses", [0, 2])
def test_a_request_that_loses_its_workers_too_often_fails_and_says_so(max_losses: int) -> None:
    bench = Bench(max_losses=max_losses)
    start = bench.start(Task(("a",), ENCODE, (0,)))
    for _ in range(max_losses):
        (again,) = bench.send(TaskFailed(start.task_id, FailureKind.LOST, "rank 0 died"))
        assert isinstance(again, StartTask)
        start = again
    fail, forget = bench.send(TaskFailed(start.task_id, FailureKind.LOST, "rank 1 died"))
    assert isinstance(fail, FailRequest)
    assert f"lost {max_losses + 1} times in a row" in fail.message
    assert "rank 1 died" in fail.message
    assert forget == ForgetRequest("a")
    assert bench.controller.state.trajectories == ()


def test_losses_count_only_in_a_row() -> None:
    bench = Bench(max_losses=1)
    bench.encoded()
    for step in range(3):
        start = bench.start(Task(("a",), DENOISE, (0,), 1))
        (again,) = bench.send(TaskFailed(start.task_id, FailureKind.LOST, "rank 0 died"))
        assert isinstance(again, StartTask)
        assert bench.send(TaskFinished.planned(again, 0.1, TensorRef(f"a.denoise.{step + 1}", 20))) == []


def test_a_lost_worker_holds_nothing_and_comes_back_empty() -> None:
    bench = Bench()
    bench.encoded()
    bench.denoised(2, 1, 2)
    bench.send(WorkerLost(1, "killed"))
    state = bench.controller.state
    assert (state.ranks, state.idle_ranks) == ((0, 2, 3), (0, 2, 3))
    assert state.trajectories[0].holders == (2,)
    bench.send(WorkerJoined(1))
    state = bench.controller.state
    assert (state.ranks, state.trajectories[0].holders) == ((0, 1, 2, 3), (2,))


def test_survivors_of_a_lost_worker_stay_busy_until_their_task_is_over() -> None:
    bench = Bench()
    bench.encoded()
    start = bench.start(Task(("a",), DENOISE, (0, 1), 2))
    bench.send(WorkerLost(1, "killed"))
    assert bench.controller.state.idle_ranks == (2, 3)
    bench.send(Cancelled("a"))
    bench.send(TaskFailed(start.task_id, FailureKind.LOST, "rank 1 died"))
    assert bench.controller.state.idle_ranks == (0, 2, 3)


WRONG_PLANS = {
    "unknown request": (Task(("z",), ENCODE, (0,)), "for z, which is not waiting"),
    "request that runs": (Task(("busy",), DENOISE, (0,), 1), "for busy, which is not waiting"),
    "cancelled request": (Task(("gone",), ENCODE, (0,)), "for gone, which is not waiting"),
    "no request": (Task((), DENOISE, (0,), 1), r"for \(\); it needs requests, each once"),
    "a request twice": (Task(("a", "a"), DENOISE, (0,), 1), r"for \('a', 'a'\); it needs requests, each once"),
    "two requests, one unknown": (Task(("a", "z"), DENOISE, (0,), 1), "for z, which is not waiting"),
    "two requests, one elsewhere": (Task(("a", "new"), DENOISE, (0,), 1), "denoise for new, which is at encode"),
    "two requests, too many steps for one": (
        Task(("a", "short"), DENOISE, (0,), 3),
        "planned 3 steps at degree 1 for short; 2 steps remain",
    ),
    "no ranks": (Task(("a",), DENOISE, (), 1), r"ranks \(\); idle are \(0, 1, 2\)"),
    "a rank twice": (Task(("a",), DENOISE, (0, 0), 1), r"ranks \(0, 0\); idle are"),
    "busy rank": (Task(("a",), DENOISE, (2, 3), 1), r"ranks \(2, 3\); idle are \(0, 1, 2\)"),
    "rank that is not there": (Task(("a",), DENOISE, (9,), 1), r"ranks \(9,\); idle are"),
    "stage that is over": (Task(("a",), ENCODE, (0,)), "planned encode for a, which is at denoise"),
    "stage too early": (Task(("a",), DECODE, (0,)), "planned decode for a, which is at denoise"),
    "no steps": (Task(("a",), DENOISE, (0,), 0), "planned 0 steps at degree 1 for a; 4 steps remain"),
    "too many steps": (Task(("a",), DENOISE, (0,), 5), "planned 5 steps at degree 1 for a; 4 steps remain"),
    "degree without a profile": (Task(("a",), DENOISE, (0, 1, 2), 1), r"at degree 3 .*degrees are \[1, 2, 4\]"),
    "wide encode": (Task(("new",), ENCODE, (0, 1)), r"planned encode at degree 2 in 0 steps; .* degrees are \[1\]"),
    "encode in steps": (Task(("new",), ENCODE, (0,), 1), "planned encode at degree 1 in 1 steps; it has none"),
}


@pytest.mark.parametrize("case", WRONG_PLANS)
def test_a_plan_that_cannot_be_is_the_policys_error(case: str) -> None:
    bench = Bench()
    bench.encoded()
    for request_id in ("busy", "gone", "new"):
        bench.send(Submitted(make_request(request_id)))
    bench.send(Cancelled("gone"))
    bench.send(Submitted(make_request("short"), None, Checkpoint(1, 2, {}, ())))
    bench.start(Task(("busy",), ENCODE, (3,)))
    task, message = WRONG_PLANS[case]
    with pytest.raises(PolicyError, match=message) as caught:
        bench.send(TimerFired(), plan=[task])
    assert "Script planned" in str(caught.value)


def test_two_tasks_of_one_plan_may_not_share_a_rank_or_a_request() -> None:
    for second in (Task(("b",), ENCODE, (0,)), Task(("a",), ENCODE, (1,))):
        bench = Bench()
        bench.send(Submitted(make_request("b")))
        with pytest.raises(PolicyError):
            bench.send(TimerFired(), plan=[Task(("a",), ENCODE, (0,)), second])


class Pair:
    """A bench whose request `a` shares its tasks with a request `b`; both are encoded."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.other = make_request("b")
        self.bench.send(Submitted(self.other))
        self.embeds = {name: TensorRef(f"{name}.encode", 1) for name in ("a", "b")}
        self.encoding = self.bench.start(self.task(ENCODE, (0,)))
        results = [Result(self.embeds[name], 0, is_stage_over=True) for name in ("a", "b")]
        assert self.bench.send(TaskFinished(self.encoding.task_id, 0.02, tuple(results))) == []

    @staticmethod
    def task(stage: str, ranks: tuple[int, ...], num_steps: int = 0) -> Task:
        return Task(("a", "b"), stage, ranks, num_steps)

    def end(self, start: StartTask, *results: Result, plan: Iterable[Task] = ()) -> list[Command]:
        return self.bench.send(TaskFinished(start.task_id, 0.1, results), 2.0, plan=plan)


def latents(name: str, num_steps: int, *, is_stage_over: bool = False) -> Result:
    return Result(TensorRef(f"{name}.denoise.{num_steps}", 1), num_steps, is_stage_over)


def test_two_requests_start_together_in_one_task_and_each_advances_by_its_own_result() -> None:
    pair = Pair()
    bench, request, other = pair.bench, pair.bench.request, pair.other
    assert pair.encoding.work == (Work(request, 0, 0, {}), Work(other, 0, 0, {}))
    task = pair.task(DENOISE, (0, 1), 2)
    start = bench.start(task, now=1.0)
    assert start.work == tuple(Work(one, 1, 0, {ENCODE: pair.embeds[one.request_id]}) for one in (request, other))
    state = bench.controller.state
    assert (state.waiting, state.idle_ranks) == ((), (2, 3))
    assert state.flights == dict.fromkeys(("a", "b"), state.in_flight[0])

    assert pair.end(start, latents("a", 2), latents("b", 2)) == []
    first, second = bench.controller.state.waiting
    for trajectory in (first, second):
        assert (trajectory.stage.kind, trajectory.steps_done, trajectory.holders) == (DENOISE, 2, (0, 1))
    alone = bench.start(Task(("b",), DENOISE, (3,), 2))
    states = {ENCODE: pair.embeds["b"], DENOISE: TensorRef("b.denoise.2", 1)}
    assert alone.work == (Work(other, 1, 2, states),)
    close, _ = bench.send(Cancelled("a"))
    assert isinstance(close, CloseCancelled)
    assert close.runs == (Run(pair.encoding.task, 0.0, 0.0), Run(task, 1.0, 2.0))


def test_two_requests_finish_together_each_with_its_own_output() -> None:
    pair = Pair()
    start = pair.bench.start(pair.task(DENOISE, (0,), 4))
    over = [latents(name, 4, is_stage_over=True) for name in ("a", "b")]
    (decoding,) = pair.end(start, *over, plan=[pair.task(DECODE, (0,))])
    assert isinstance(decoding, StartTask)
    outputs = [Result(TensorRef(f"{name}.decode", 1), 0, is_stage_over=True) for name in ("a", "b")]
    finish_a, forget_a, finish_b, forget_b = pair.end(decoding, *outputs)
    assert isinstance(finish_a, FinishRequest)
    assert isinstance(finish_b, FinishRequest)
    assert (finish_a.request, finish_b.request) == (pair.bench.request, pair.other)
    assert (finish_a.output.ref, finish_b.output.ref) == (TensorRef("a.decode", 1), TensorRef("b.decode", 1))
    assert finish_a.runs == finish_b.runs
    assert [run.task.members for run in finish_a.runs] == [("a", "b")] * 3
    assert (forget_a, forget_b) == (ForgetRequest("a"), ForgetRequest("b"))
    assert pair.bench.controller.num_unfinished == 0


def test_of_two_requests_in_a_task_one_that_is_cancelled_is_closed_when_it_ends_and_the_other_goes_on() -> None:
    pair = Pair()
    start = pair.bench.start(pair.task(DENOISE, (0, 1), 2))
    assert pair.bench.send(Cancelled("a")) == []
    assert pair.bench.controller.state.idle_ranks == (2, 3)
    assert_closed(pair.end(start, latents("a", 2), latents("b", 2)), [ENCODE, DENOISE])
    (trajectory,) = pair.bench.controller.state.waiting
    assert (trajectory.request_id, trajectory.steps_done) == ("b", 2)


def test_a_lost_task_of_two_requests_costs_each_of_them_a_task_and_each_is_done_again() -> None:
    pair = Pair()
    start = pair.bench.start(pair.task(DENOISE, (0,), 2))
    again = pair.bench.send(TaskFailed(start.task_id, FailureKind.LOST, "rank 0 died"))
    assert {command.task.members: command.task.num_steps for command in again if isinstance(command, StartTask)} == {
        ("a",): 1, ("b",): 1
    }  # fmt: skip
    assert len(again) == 2
    for losses in (2, 3):
        for name in ("a", "b"):
            (flight,) = [each for each in pair.bench.controller.state.in_flight if each.task.members == (name,)]
            (retry,) = pair.bench.send(TaskFailed(flight.task_id, FailureKind.LOST, f"loss {losses}"))
            assert isinstance(retry, StartTask)
    for name in ("a", "b"):
        (flight,) = [each for each in pair.bench.controller.state.in_flight if each.task.members == (name,)]
        fail, forget = pair.bench.send(TaskFailed(flight.task_id, FailureKind.LOST, "the last"))
        assert isinstance(fail, FailRequest)
        assert "lost 4 times in a row, last: the last" in fail.message
        assert forget == ForgetRequest(name)


def test_of_two_requests_in_a_lost_task_one_that_was_cancelled_is_closed_and_the_other_is_done_again() -> None:
    pair = Pair()
    start = pair.bench.start(pair.task(DENOISE, (0,), 2))
    pair.bench.send(Cancelled("a"))
    *closed, again = pair.bench.send(TaskFailed(start.task_id, FailureKind.LOST, "rank 0 died"))
    assert_closed(closed, [ENCODE])
    assert isinstance(again, StartTask)
    assert again.task.members == ("b",)


def test_a_step_that_fails_in_a_shared_task_ends_nobody() -> None:
    pair = Pair()
    start = pair.bench.start(pair.task(DENOISE, (0,), 2))
    assert pair.bench.send(TaskFailed(start.task_id, FailureKind.STEP, "not finite")) == []
    assert [(each.request_id, each.steps_done, each.is_apart) for each in pair.bench.controller.state.waiting] == [
        ("a", 0, True), ("b", 0, True)
    ]  # fmt: skip


def test_fewer_steps_than_planned_advance_a_request_only_by_these_and_teach_nothing_about_the_cost() -> None:
    pair = Pair()
    cost = pair.bench.controller.cost
    start = pair.bench.start(pair.task(DENOISE, (0,), 3), now=1.0)
    pair.end(start, latents("a", 1), latents("b", 3))
    first, second = pair.bench.controller.state.waiting
    assert (first.steps_done, first.stage_steps_done, first.remaining_steps) == (1, 1, 3)
    assert (second.steps_done, second.stage_steps_done, second.remaining_steps) == (3, 3, 1)
    assert pair.bench.controller.cost is cost
    rest = pair.bench.start(Task(("a",), DENOISE, (0,), 3))
    assert (rest.work[0].steps_done, rest.work[0].states[DENOISE]) == (1, TensorRef("a.denoise.1", 1))
    close, _ = pair.bench.send(Cancelled("b"))
    fail, _ = pair.bench.send(TaskFailed(rest.task_id, FailureKind.STEP, "enough"))
    assert isinstance(close, CloseCancelled)
    assert isinstance(fail, FailRequest)
    assert close.runs[-1] == Run(pair.task(DENOISE, (0,), 3), 1.0, 2.0)
    assert fail.runs[-1] == Run(pair.task(DENOISE, (0,), 1), 1.0, 2.0)


def test_a_stage_that_is_over_early_is_followed_by_the_next() -> None:
    pair = Pair()
    start = pair.bench.start(pair.task(DENOISE, (0,), 3), now=1.0)
    decode = Task(("a",), DECODE, (0,))
    early = latents("a", 2, is_stage_over=True)
    (decoding,) = pair.end(start, early, latents("b", 3), plan=[decode])
    states = {ENCODE: pair.embeds["a"], DENOISE: early.left}
    assert decoding == StartTask(start.task_id + 1, decode, (Work(pair.bench.request, 2, 0, states),))
    (second,) = pair.bench.controller.state.waiting
    assert (second.request_id, second.stage.kind, second.remaining_steps) == ("b", DENOISE, 1)
    finish, _ = pair.bench.send(TaskFinished.planned(decoding, 0.1, TensorRef("a.decode", 1)), 3.0)
    assert isinstance(finish, FinishRequest)
    assert finish.runs[1:] == (Run(pair.task(DENOISE, (0,), 2), 1.0, 2.0), Run(decode, 2.0, 3.0))


@dataclass(frozen=True, kw_only=True)
class Weather:
    """What may happen to a random run."""

    num_requests: int
    death_rate: float = 0.0
    cancel_rate: float = 0.0
    failure_rate: float = 0.0
    short_rate: float = 0.0
    """How often a request does fewer steps in a task than it was to do."""


@dataclass
class Pool:
    """Ranks that run tasks on a virtual clock, die, and come back, as the executor's do; checks every command."""

    controller: Controller
    rng: random.Random
    weather: Weather
    num_ranks: int = 4
    now: float = 0.0
    log: list[tuple[float, Event, list[Command]]] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    forgotten: Counter[str] = field(default_factory=Counter)
    closed: Counter[str] = field(default_factory=Counter)
    cancelled: set[str] = field(default_factory=set)
    steps_done: Counter[str] = field(default_factory=Counter)
    _heap: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _count: itertools.count[int] = field(default_factory=itertools.count)
    _busy: dict[int, StartTask] = field(default_factory=dict)
    _living: set[int] = field(default_factory=set)
    _running: set[int] = field(default_factory=set)
    _timer: int = 0

    def run(self, requests: list[Request]) -> None:
        for rank in range(self.num_ranks):
            self._later(0.0, lambda rank=rank: self._join(rank))
        for request in requests:
            self._later(request.arrival_s, lambda request=request: self._send(Submitted(request)))
            if self.rng.random() < self.weather.cancel_rate:
                self._later(request.arrival_s + self.rng.uniform(0.0, 3.0), lambda r=request: self._cancel(r))
        while self._heap:
            assert len(self.log) < 20_000, "the run does not end"
            self.now, _, act = heapq.heappop(self._heap)
            act()

    def _later(self, time_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (time_s, next(self._count), act))

    def _send(self, event: Event) -> None:
        commands = self.controller.handle(event, self.now)
        self.log.append((self.now, event, commands))
        state = self.controller.state
        assert not (state.idle_ranks and any(trajectory.lost_degree for trajectory in state.waiting))
        for command in commands:
            self._carry_out(command)

    def _carry_out(self, command: Command) -> None:
        match command:
            case StartTask():
                self._start(command)
            case WakeAt(time_s):
                assert time_s > self.now, "a wish to wake at once would never end"
                self._timer += 1
                self._later(time_s, lambda number=self._timer: self._fire(number))
            case FinishRequest(request, runs):
                assert self.steps_done[request.request_id] == request.num_steps
                assert sum(run.task.num_steps for run in runs) == request.num_steps
                self._end(request.request_id)
            case FailRequest(request):
                self._end(request.request_id)
            case CloseCancelled(request):
                assert request.request_id in self.cancelled
                self.closed[request.request_id] += 1
            case ForgetRequest(request_id):
                assert request_id not in self._running_requests
                self.forgotten[request_id] += 1

    def _end(self, request_id: str) -> None:
        assert request_id not in self.cancelled
        assert not self.forgotten[request_id]
        self.ends[request_id] += 1

    @property
    def _running_requests(self) -> set[str]:
        return {request_id for start in self._busy.values() for request_id in start.task.members}

    def _start(self, start: StartTask) -> None:
        task = start.task
        assert tuple(work.request.request_id for work in start.work) == task.members
        assert self._living.issuperset(task.ranks)
        assert self._busy.keys().isdisjoint(task.ranks), "a rank is in one task at a time"
        assert self._running_requests.isdisjoint(task.members)
        for work in start.work:
            self._check_work(task, work)
        self._busy |= dict.fromkeys(task.ranks, start)
        self._running.add(start.task_id)
        seconds = {
            ENCODE: 0.02,
            DENOISE: task.num_steps * STEP_S[start.work[0].request.shape.height][task.degree],
            DECODE: DECODE_S[start.work[0].request.shape.height],
        }[task.stage] * self.rng.uniform(0.8, 1.5)
        if self.rng.random() < self.weather.death_rate:
            rank = self.rng.choice(task.ranks)
            self._later(self.now + self.rng.uniform(0.0, seconds), lambda: self._die(rank))
        self._later(self.now + seconds, lambda: self._land(start, seconds))

    def _check_work(self, task: Task, work: Work) -> None:
        request_id, steps_done = work.request.request_id, self.steps_done[work.request.request_id]
        assert work.trajectory.stage.kind == task.stage
        assert work.trajectory.steps_done == steps_done
        assert (ENCODE in work.states) == (task.stage != ENCODE)
        assert (DENOISE in work.states) == (steps_done > 0)
        if steps_done:
            assert work.states[DENOISE].key == f"{request_id}.{DENOISE}.{steps_done}"

    def _land(self, start: StartTask, seconds: float) -> None:
        if start.task_id not in self._running:
            return
        self._free(start)
        if self.rng.random() < self.weather.failure_rate:
            self._send(TaskFailed(start.task_id, FailureKind.STEP, "it failed"))
            return
        results = tuple(self._result(start.task, work) for work in start.work)
        self._send(TaskFinished(start.task_id, seconds, results))

    def _result(self, task: Task, work: Work) -> Result:
        request_id, stage = work.request.request_id, work.trajectory.stage
        num_steps = task.num_steps
        if num_steps > 1 and self.rng.random() < self.weather.short_rate:
            num_steps = self.rng.randrange(1, num_steps)
        self.steps_done[request_id] += num_steps
        steps_done = work.steps_done + num_steps
        left = TensorRef(f"{request_id}.{task.stage}.{steps_done}", 1)
        return Result(left, num_steps, is_stage_over=steps_done == stage.num_steps)

    def _die(self, rank: int) -> None:
        if rank not in self._living:
            return
        self._living.remove(rank)
        self._later(self.now + self.rng.uniform(0.1, 2.0), lambda: self._join(rank))
        self._send(WorkerLost(rank, "killed"))
        start = self._busy.get(rank)
        if start is not None:
            self._free(start)
            self._send(TaskFailed(start.task_id, FailureKind.LOST, f"rank {rank} died"))

    def _free(self, start: StartTask) -> None:
        self._running.remove(start.task_id)
        for rank in start.task.ranks:
            del self._busy[rank]

    def _join(self, rank: int) -> None:
        self._living.add(rank)
        self._send(WorkerJoined(rank))

    def _fire(self, number: int) -> None:
        if number == self._timer:
            self._send(TimerFired())

    def _cancel(self, request: Request) -> None:
        request_id = request.request_id
        if not self.ends[request_id]:
            self.cancelled.add(request_id)
        self._send(Cancelled(request_id))


class Erratic:
    """A policy whose plans are legal and otherwise arbitrary, yet a function of state and time alone.

    most: members of a task.
    """

    def __init__(self, most: int = 1) -> None:
        self._most = most

    def plan(self, state: State, now: float) -> Plan:
        rng = random.Random(f"{now}{state.idle_ranks}{len(state.trajectories)}")
        free = list(state.idle_ranks)
        rng.shuffle(free)
        tasks = []
        waiting = list(state.waiting)
        while waiting:
            stage, shape = waiting[0].stage.kind, waiting[0].request.shape
            alike = [each for each in waiting if (each.stage.kind, each.request.shape) == (stage, shape)]
            members = [each for each in alike if not each.is_apart][: rng.randint(1, self._most)]
            if waiting[0].is_apart:
                members = waiting[:1]
            waiting = [trajectory for trajectory in waiting if trajectory not in members]
            degree = rng.choice([1, 2, 4]) if stage == DENOISE else 1
            if len(free) < degree or rng.random() < 0.2:
                continue
            remaining = min(trajectory.remaining_steps for trajectory in members)
            num_steps = rng.randint(1, remaining) if stage == DENOISE else 0
            ranks = tuple(free.pop() for _ in range(degree))
            tasks.append(Task(tuple(each.request_id for each in members), stage, ranks, num_steps))
        return Plan(tuple(tasks), wake_at=now + 0.1 if state.waiting else None)


def new_policy(name: str) -> Policy:
    if name in ("erratic", "sociable"):
        return Erratic(most={"erratic": 1, "sociable": 3}[name])
    return make_policy(name, COST, num_ranks=4, shapes=COST.profile.shapes)


weathers = st.builds(
    Weather,
    num_requests=st.integers(1, 12),
    death_rate=st.sampled_from([0.0, 0.05, 0.3]),
    cancel_rate=st.sampled_from([0.0, 0.3]),
    failure_rate=st.sampled_from([0.0, 0.05]),
    short_rate=st.sampled_from([0.0, 0.3]),
)


@pytest.mark.parametrize("policy", ["erratic", "sociable", "fcfs", "fcfs:batch=3", "fixed:2", "tetriserve"])
@given(weather=weathers, seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_in_any_weather_every_request_ends_exactly_once_and_a_replay_gives_the_same_commands(
    policy: str, weather: Weather, seed: int
) -> None:
    rng = random.Random(seed)
    arrivals = sorted(rng.uniform(0.0, 4.0) for _ in range(weather.num_requests))
    requests = [
        dataclasses.replace(
            make_request(f"r{number}", rng.choice([256, 256, 512]), rng.randint(1, 12)),
            arrival_s=arrival_s, deadline_s=arrival_s + rng.uniform(0.3, 8.0), priority=rng.choice([0, 0, 1]),
        )
        for number, arrival_s in enumerate(arrivals)
    ]  # fmt: skip
    pool = Pool(Controller(new_policy(policy), COST), rng, weather)
    pool.run(requests)

    state = pool.controller.state
    assert (state.trajectories, state.in_flight, state.ranks) == ((), (), (0, 1, 2, 3))
    for request in requests:
        assert pool.forgotten[request.request_id] == 1
        assert pool.closed[request.request_id] == (1 if request.request_id in pool.cancelled else 0)
        assert pool.ends[request.request_id] == (0 if request.request_id in pool.cancelled else 1)

    again = Controller(new_policy(policy), COST)
    for now, event, commands in pool.log:
        assert again.handle(event, now) == commands
