"""The exact search: against a search of another kind, against the bound, and what it does when it is stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetriserve.core.plan import InFlight, Plan, State, Task
from tetriserve.core.stages import DECODE, DENOISE
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.exhaustive import Exhaustive
from tetriserve.policies.policy import Policy
from tetriserve.policies.registry import POLICIES, make_policy
from tetriserve.simulator.bound import max_attained
from tetriserve.simulator.instance import instance_at_once
from tetriserve.simulator.run import simulate
from tetriserve.simulator.scenario import Scenario

few = settings(max_examples=40, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Ticks:
    """A tiny instance in whole ticks: per request its deadline, number of steps and ticks per step by degree.

    decode: ticks by degree.
    """

    num_ranks: int
    switch: int
    move: int
    encode: int
    decode: tuple[tuple[int, int], ...]
    jobs: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]


def best_tick_by_tick(ticks: Ticks) -> tuple[int, int]:
    """Most deadlines attained, and the least sum of finish times then: at every tick, every set of tasks is tried.

    A job is its progress (encode, steps and decode count), the tick at which its last task ends, and that one's degree.
    """
    Job = tuple[int, int, int]

    def next_tasks(index: int, progress: int) -> list[tuple[int, int, int]]:
        _, num_steps, times = ticks.jobs[index]
        if progress == 0:
            return [(1, ticks.encode, 1)]
        if progress == num_steps + 1:
            return [(k, decode, 1) for k, decode in ticks.decode]
        return [(k, q * step, q) for k, step in times for q in range(1, num_steps + 2 - progress)]

    @cache
    def best(now: int, jobs: tuple[Job, ...]) -> tuple[int, int]:
        return choose(0, now, ticks.num_ranks - sum(degree for _, end, degree in jobs if end > now), jobs)

    def choose(index: int, now: int, free: int, jobs: tuple[Job, ...]) -> tuple[int, int]:
        if index == len(jobs):
            if all(progress == ticks.jobs[i][1] + 2 for i, (progress, _, _) in enumerate(jobs)):
                in_time = sum(end <= ticks.jobs[i][0] for i, (_, end, _) in enumerate(jobs))
                return in_time, -sum(end for _, end, _ in jobs)
            if all(end <= now for _, end, _ in jobs):
                return -1, 0  # nothing would ever run again
            return best(now + 1, jobs)
        found = choose(index + 1, now, free, jobs)
        progress, end, degree = jobs[index]
        if end <= now and progress < ticks.jobs[index][1] + 2:
            for width, work, num_done in next_tasks(index, progress):
                if width <= free:
                    move = ticks.move if degree not in (0, width) else 0
                    job = (progress + num_done, now + ticks.switch + move + work, width)
                    started = (*jobs[:index], job, *jobs[index + 1 :])
                    found = max(found, choose(index + 1, now, free - width, started))
        return found

    attained, negative_total = best(0, tuple((0, 0, 0) for _ in ticks.jobs))
    return attained, -negative_total


@st.composite
def tiny(draw: st.DrawFn) -> Ticks:
    num_jobs, num_ranks, most_steps = draw(st.sampled_from([(1, 3, 3), (2, 1, 3), (2, 2, 3), (2, 3, 2), (3, 2, 1)]))
    jobs = []
    for _ in range(num_jobs):
        times = tuple((degree, draw(st.integers(1, 3))) for degree in range(1, num_ranks + 1))
        jobs.append((draw(st.integers(2, 14)), draw(st.integers(1, most_steps)), times))
    switch, move = draw(st.integers(0, 1)), draw(st.sampled_from([0, 0, 1]))
    degrees = range(1, 1 + draw(st.integers(1, min(2, num_ranks))))
    decode = tuple((degree, draw(st.integers(1, 3))) for degree in degrees)
    return Ticks(num_ranks, switch, move, 1, decode, tuple(jobs))


def build(ticks: Ticks, table_cost, request_of):
    heights = [256 * (index + 1) for index in range(len(ticks.jobs))]
    steps: Mapping[int, Mapping[int, float]] = {
        height: {degree: float(step) for degree, step in times}
        for height, (_, _, times) in zip(heights, ticks.jobs, strict=True)
    }
    cost = table_cost(
        steps,
        dict.fromkeys(heights, {degree: float(decode) for degree, decode in ticks.decode}),
        encode=float(ticks.encode),
        switch_s=float(ticks.switch),
        move_s=float(ticks.move),
    )
    requests = [
        request_of(height, request_id=f"r{height}", deadline_s=float(deadline), num_steps=num_steps)
        for height, (deadline, num_steps, _) in zip(heights, ticks.jobs, strict=True)
    ]
    return cost, requests


def state_of(requests, cost, num_ranks: int) -> State:
    return State(tuple(map(Trajectory, requests)), (), tuple(range(num_ranks)), cost)


@dataclass(frozen=True)
class OnceAllAreKnown:
    """Lets a policy begin when the last of `count` requests has arrived: the simulator hands them over one by one."""

    policy: Policy
    count: int

    def plan(self, state: State, now: float) -> Plan:
        return self.policy.plan(state, now) if now > 0 or len(state.trajectories) == self.count else Plan()


def run(policy: Policy, requests, cost, num_ranks: int) -> tuple[int, float]:
    outcomes = list(simulate(OnceAllAreKnown(policy, len(requests)), cost, requests, num_ranks=num_ranks))
    return sum(outcome.is_attained for outcome in outcomes), sum(outcome.finish_s for outcome in outcomes)


def test_it_is_as_good_as_trying_every_set_of_tasks_at_every_tick(table_cost, request_of) -> None:
    @few
    @given(ticks=tiny())
    def check(ticks: Ticks) -> None:
        cost, requests = build(ticks, table_cost, request_of)
        expected = best_tick_by_tick(ticks)
        found = Exhaustive().search(state_of(requests, cost, ticks.num_ranks), 0.0)
        assert found.is_exact
        assert (found.num_attained, found.total_finish_s) == expected
        if not ticks.move:  # else a task may not find its ranks free
            assert run(Exhaustive(), requests, cost, ticks.num_ranks) == expected

    check()


def test_on_requests_that_are_all_known_no_policy_is_better_and_the_bound_holds(table_cost, request_of) -> None:
    others = [name for name, spec in POLICIES.items() if not spec.is_for_study and name != "fixed"] + ["fixed:1"]
    seconds = st.floats(0.05, 1.0)

    @few
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        heights = (256, 512, 1024)
        steps = {height: {degree: data.draw(seconds) for degree in (1, 2, 4)} for height in heights}
        cost = table_cost(steps, {height: data.draw(seconds) for height in heights}, encode=0.1, switch_s=0.01)
        requests = [
            request_of(height, request_id=f"r{height}", deadline_s=data.draw(st.floats(0.3, 6.0)), num_steps=3)
            for height in heights[: data.draw(st.integers(1, 3))]
        ]
        found = Exhaustive().search(state_of(requests, cost, 4), 0.0)
        assert found.is_exact
        attained, total_finish_s = run(Exhaustive(), requests, cost, 4)
        assert attained == found.num_attained <= max_attained(requests, cost, 4)
        assert total_finish_s == pytest.approx(found.total_finish_s, abs=1e-6)
        for spec in others:
            policy = make_policy(spec, cost, num_ranks=4, shapes=cost.shapes)
            its_attained, its_total_s = run(policy, requests, cost, 4)
            assert (its_attained, -its_total_s) <= (attained, -total_finish_s + 1e-6), spec

    check()


def test_a_deliberate_pause_and_a_mix_of_degrees_are_found(table_cost, request_of) -> None:
    """Two ranks. The tight request needs both from 0.25 to 2.25; the loose one must not take one of them before."""
    cost = table_cost({256: {1: 2.0, 2: 1.0}, 512: {1: 1.0}}, {256: 0.125, 512: 0.125}, encode=0.25, switch_s=0.0)
    tight = request_of(256, request_id="tight", deadline_s=2.375, num_steps=2)
    loose = request_of(512, request_id="loose", deadline_s=3.375, num_steps=1)
    assert run(Exhaustive(), [tight, loose], cost, 2) == (2, 2.375 + 3.375)
    assert run(make_policy("edf", cost, num_ranks=2, shapes=cost.shapes), [loose, tight], cost, 2)[0] == 1


def test_a_task_in_flight_holds_its_ranks_and_its_request(table_cost, request_of) -> None:
    cost = table_cost({256: {1: 1.0, 2: 0.5}}, {256: 0.1}, encode=0.1, switch_s=0.0)
    running = replace(Trajectory.at(request_of(256, request_id="a", num_steps=4), 1, 0), holders=(0,), is_running=True)
    waiting = replace(Trajectory.at(request_of(256, request_id="b", num_steps=2), 1, 0), holders=(1,))
    flight = InFlight(0, Task(("a",), DENOISE, (0,), 2), 0.0, 2.0)
    state = State((running, waiting), (flight,), (0, 1), cost)
    assert Exhaustive().plan(state, 1.0) == Plan((Task(("b",), DENOISE, (1,), 1),))
    found = Exhaustive().search(state, 1.0)
    # "b": a step alone until 2.0, one on both ranks, decode until 2.6. "a": from 2.5 on both ranks, or on what is left.
    assert found.is_exact
    assert found.num_attained == 2


def test_a_task_that_is_overdue_does_not_free_its_ranks(table_cost, request_of) -> None:
    cost = table_cost({256: {2: 0.5}}, {256: 0.1}, encode=0.1, switch_s=0.0)
    running = replace(Trajectory.at(request_of(256, request_id="a", num_steps=1), 1, 1), is_running=True)
    waiting = Trajectory.at(request_of(256, request_id="b", num_steps=1), 1, 0)
    state = State((running, waiting), (InFlight(0, Task(("a",), DECODE, (0,)), 0.0, 0.1),), (0, 1), cost)
    assert Exhaustive().plan(state, 5.0) == Plan()
    assert Exhaustive().plan(State((waiting,), (), (0, 1), cost), 5.0).tasks[0].ranks == (0, 1)


def test_a_search_that_is_stopped_serves_by_deadline_and_says_so(flux, request_of) -> None:
    requests = [request_of(2048, request_id=f"r{index}", deadline_s=4.0 + 4 * index) for index in range(4)]
    state = state_of(requests, flux, 8)
    found = Exhaustive(5).search(state, 0.0)
    assert (found.num_nodes, found.is_exact) == (5, False)
    assert found.num_attained == 4
    assert found.starts[0].request_id == "r0"
    assert Exhaustive(5).search(state_of(requests[:1], flux, 8), 0.0).is_exact


def test_the_instances_of_the_papers_table_arrive_at_once_and_grow_quickly() -> None:
    numbers = []
    for num_requests in (1, 2):
        state = instance_at_once(4, num_requests, scenario=Scenario(num_steps=6), seed=1)
        assert {trajectory.request.arrival_s for trajectory in state.trajectories} == {0.0}
        assert [trajectory.request.deadline_s for trajectory in state.trajectories] == [5.0, 1.5][:num_requests]
        assert len(state.idle_ranks) == 4
        found = Exhaustive().search(state, 0.0)
        assert found.is_exact
        numbers.append(found.num_nodes)
    assert numbers[1] > 20 * numbers[0]
