"""The event loop under a virtual clock: exact times, noise by seed, endless workloads."""

from __future__ import annotations

import json
import math
from itertools import count, islice

import pytest

from tetriserve.core.plan import Plan, State, Task
from tetriserve.policies.fixed import FirstComeFirstServed, FixedDegree
from tetriserve.simulator.run import simulate
from tetriserve.workload.outcome import Status


def test_a_lone_request_takes_its_stages_and_the_start_of_each_task(table_cost, request_of) -> None:
    cost = table_cost({256: {1: 0.1, 2: 0.0625}}, encode=0.2, decode=0.3, switch_s=0.01)
    (outcome,) = simulate(FirstComeFirstServed(), cost, [request_of(5.0, 9.0, num_steps=20)], num_ranks=2)
    # Tasks of half a second: 8, 8 and 4 steps.
    assert outcome.finish_s == pytest.approx(5.0 + (0.2 + 0.01) + (20 * 0.0625 + 3 * 0.01) + (0.3 + 0.01))
    assert [run.task.num_steps for run in outcome.runs] == [0, 8, 8, 4, 0]
    assert outcome.is_attained
    assert outcome.queued_s == pytest.approx(0.0)


def test_a_task_on_other_ranks_than_the_last_costs_the_move(table_cost, request_of) -> None:
    class Wandering:
        """One step at a time, on the other rank each time."""

        def plan(self, state: State, now: float) -> Plan:
            return Plan(
                tuple(
                    Task((each.request_id,), each.stage.kind, (each.steps_done % 2,), int(not each.is_short))
                    for each in state.waiting
                )
            )

    cost = table_cost({256: {1: 1.0}}, encode=0.5, decode=0.25, switch_s=0.01, move_s=0.1)
    (outcome,) = simulate(Wandering(), cost, [request_of(0.0, 9.0, num_steps=3)], num_ranks=2)
    # Encode and the first step on rank 0, then on 1, on 0, and decode on 1.
    assert outcome.finish_s == pytest.approx(0.5 + 3 * 1.0 + 0.25 + 5 * 0.01 + 3 * 0.1)


def test_the_second_request_waits_for_the_first(table_cost, request_of) -> None:
    cost = table_cost({256: {1: 1.0}})
    requests = [request_of(0.0, 3.0, num_steps=3, name="a"), request_of(1.0, 3.5, num_steps=2, name="b")]
    outcomes = list(simulate(FixedDegree(1), cost, requests, num_ranks=1))
    assert [(each.request.request_id, each.finish_s, each.is_attained) for each in outcomes] == [
        ("a", 3.0, True),
        ("b", 5.0, False),
    ]
    assert outcomes[1].queued_s == pytest.approx(2.0)


def test_noise_follows_from_its_seed_and_has_the_size_asked_for(table_cost, request_of) -> None:
    cost = table_cost({256: {1: 1.0}})
    requests = [request_of(10.0 * number, 1e6, name=f"r{number}") for number in range(2000)]

    def finishes(noise: float, seed: int) -> list[float]:
        return [
            each.latency_s for each in simulate(FixedDegree(1), cost, requests, num_ranks=1, noise=noise, seed=seed)
        ]

    assert finishes(0.1, 1) == finishes(0.1, 1)
    assert finishes(0.1, 1) != finishes(0.1, 2)
    assert set(finishes(0.0, 1)) == {1.0}
    latencies = finishes(0.1, 1)
    mean = sum(latencies) / len(latencies)
    assert mean == pytest.approx(1.0, abs=0.01)
    assert math.sqrt(sum((each - mean) ** 2 for each in latencies) / len(latencies)) == pytest.approx(0.1, rel=0.1)


def test_outcomes_come_while_requests_still_arrive(table_cost, request_of) -> None:
    endless = (request_of(2.0 * number, 2.0 * number + 1.5, name=f"r{number}") for number in count())
    outcomes = list(islice(simulate(FixedDegree(1), table_cost({256: {1: 1.0}}), endless, num_ranks=1), 1000))
    assert [outcome.request.request_id for outcome in outcomes[-2:]] == ["r998", "r999"]
    assert all(outcome.is_attained for outcome in outcomes)


def test_finished_requests_are_forgotten(table_cost, request_of) -> None:
    from tetriserve.simulator.run import Simulation

    requests = [request_of(2.0 * number, 1e6, name=f"r{number}") for number in range(500)]
    simulation = Simulation(FixedDegree(1), table_cost({256: {1: 1.0}}), num_ranks=1)
    most = max(len(simulation.controller.state.trajectories) for _ in simulation.run(requests))
    assert most <= 1
    assert simulation._pool.is_at_rest


class EveryTenSeconds:
    """Starts whatever waits, but only at multiples of ten seconds; asks to be woken at the next."""

    def plan(self, state, now: float) -> Plan:
        if now % 10 == 0 and state.waiting and state.idle_ranks:
            first = state.waiting[0]
            num_steps = 0 if first.is_short else first.remaining_steps
            return Plan((Task((first.request_id,), first.stage.kind, state.idle_ranks[:1], num_steps),), now + 10)
        return Plan(wake_at=now - now % 10 + 10 if state.waiting else None)


def test_timers_wake_the_policy_when_it_asked(table_cost, request_of) -> None:
    cost = table_cost({256: {1: 1.0}}, encode=0.5)
    (outcome,) = simulate(EveryTenSeconds(), cost, [request_of(3.0, 99.0, num_steps=2)], num_ranks=1)
    assert [run.start_s for run in outcome.runs] == [10.0, 20.0, 30.0]
    assert outcome.finish_s == 30.0


@pytest.mark.parametrize(("numbers", "message"), [({"num_ranks": 0}, "num_ranks is 0"), ({"noise": -1}, "noise is -1")])
def test_numbers_that_cannot_be_are_refused(table_cost, numbers, message) -> None:
    with pytest.raises(ValueError, match=message):
        list(simulate(FixedDegree(1), table_cost({256: {1: 1.0}}), [], **{"num_ranks": 1, **numbers}))


def test_what_a_policy_never_finishes_is_missed(flux, workload) -> None:
    class Idle:
        def plan(self, state, now: float) -> Plan:
            return Plan()

    requests = workload(count=3)
    outcomes = list(simulate(Idle(), flux, requests, num_ranks=8))
    assert [outcome.request for outcome in outcomes] == requests
    assert {outcome.status for outcome in outcomes} == {Status.FAILED}
    assert not any(outcome.is_attained for outcome in outcomes)
    assert outcomes[0].message == "the policy left it unfinished"
    json.dumps([outcome.as_json() for outcome in outcomes], allow_nan=False)
