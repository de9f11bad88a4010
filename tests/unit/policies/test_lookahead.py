"""What reservations promise, with numbers: who starts, who waits for whom, and what late requests may not do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tetriserve.core.plan import InFlight, Plan, State, Task
from tetriserve.core.stages import DECODE, DENOISE
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.reservation import MIN_RESERVED, num_reserved

RANKS = tuple(range(8))


def encoded(request, steps_done=0, holders=(), *, is_running=False):
    return replace(Trajectory.at(request, 1, steps_done), holders=holders, is_running=is_running)


def denoise_tasks(plan):
    return {task.members[0]: (task.degree, task.num_steps) for task in plan.tasks if task.stage == DENOISE}


@pytest.fixture
def policy(make, flux):
    return make("lookahead", flux)


@pytest.fixture
def narrow(make, flux):
    """Without widening: what the reservations alone ask for."""
    return make("lookahead:widen=off", flux)


@pytest.fixture
def beside_a_short_task(request_of):
    """Seven ranks idle, the eighth busy with the last steps of someone else until 0.2 s."""

    def build(*trajectories, cost):
        running = encoded(request_of(512, request_id="running"), 24, (0,), is_running=True)
        flight = InFlight(0, Task(("running",), DENOISE, (0,), 4), 0.0, 0.2)
        return State((running, *trajectories), (flight,), RANKS, cost)

    return build


@pytest.mark.parametrize(("deadline_s", "degree"), [(30.0, 1), (13.0, 2), (7.0, 4), (4.0, 8)])
def test_reserves_the_narrowest_degree_that_ends_in_time(deadline_s, degree, narrow, request_of, flux):
    """28 steps of 2048 take 21.3, 11.4, 6.1 and 3.4 s at 1, 2, 4 and 8 ranks, decode 0.25 s."""
    state = State((encoded(request_of(2048, deadline_s=deadline_s)),), (), RANKS, flux)
    assert denoise_tasks(narrow.plan(state, 0.0))["r"][0] == degree


def test_widens_into_ranks_that_nobody_needs(policy, request_of, flux):
    state = State((encoded(request_of(2048, deadline_s=30.0)),), (), RANKS, flux)
    assert denoise_tasks(policy.plan(state, 0.0)) == {"r": (8, 2)}


def test_the_cheapest_reservations_run_side_by_side(policy, request_of, flux):
    """Two of 2048 in 7 s: each on 4 ranks for 6.1 s; one after the other on 8 the second would end at 7.3 s."""
    requests = tuple(encoded(request_of(2048, request_id=name, deadline_s=7.0)) for name in "ab")
    assert denoise_tasks(policy.plan(State(requests, (), RANKS, flux), 0.0)) == {"a": (4, 1), "b": (4, 1)}


def test_a_filler_never_delays_a_reservation(policy, request_of, flux, beside_a_short_task):
    """The urgent one can use 4 ranks for no step of 0.218 s before it gets 8 at 0.2 s; late steps of 0.154 s fit."""
    urgent = encoded(request_of(2048, request_id="urgent", deadline_s=4.1))
    late = encoded(request_of(1024, request_id="late", deadline_s=-1.0))
    plan = policy.plan(beside_a_short_task(urgent, late, cost=flux), 0.0)
    assert denoise_tasks(plan) == {"late": (2, 1)}
    assert plan.wake_at == pytest.approx(0.2, abs=0.01)
    plan = policy.plan(beside_a_short_task(urgent, late, cost=flux), 0.11)
    assert denoise_tasks(plan) == {"late": (4, 1)}
    assert policy.plan(beside_a_short_task(urgent, late, cost=flux), 0.18).tasks == ()


def test_an_overdue_task_is_waited_for_and_asked_about_again(policy, request_of, flux, beside_a_short_task):
    urgent = encoded(request_of(2048, request_id="urgent", deadline_s=4.3))
    plan = policy.plan(beside_a_short_task(urgent, cost=flux), 0.21)
    assert plan.tasks == ()
    assert 0.21 < plan.wake_at <= 0.22


def test_late_requests_run_in_short_tasks(policy, request_of, flux):
    late = [encoded(request_of(size, request_id=str(size), deadline_s=-1.0)) for size in (256, 512, 1024, 2048)]
    plan = policy.plan(State(tuple(late), (), RANKS, flux), 0.0)
    assert denoise_tasks(plan) == {"256": (1, 6), "512": (1, 2), "1024": (2, 1), "2048": (4, 1)}


def test_a_shape_without_short_steps_still_runs_when_late(make, request_of, table_cost):
    cost = table_cost({256: {1: 0.02}, 2048: {1: 9.0, 2: 5.0}}, {256: 0.01, 2048: 0.1})
    state = State((encoded(request_of(2048, deadline_s=-1.0)),), (), (0, 1), cost)
    assert denoise_tasks(make("lookahead", cost, 2).plan(state, 0.0)) == {"r": (1, 1)}  # leaves a rank to arrivals


@pytest.mark.parametrize("degrees", [(1,), (2,)])
def test_long_steps_leave_no_rank_idle_where_none_could_run_beside_them(make, request_of, table_cost, degrees):
    cost = table_cost({2048: dict.fromkeys(degrees, 5.0)}, {2048: 0.1})
    ranks = tuple(range(degrees[0]))
    state = State((encoded(request_of(2048, deadline_s=-1.0)),), (), ranks, cost)
    assert denoise_tasks(make("lookahead", cost, len(ranks)).plan(state, 0.0)) == {"r": (degrees[0], 1)}


@pytest.mark.parametrize(("lately", "deadline_s", "num_steps_started"), [
    ((), 60.0, 4),
    ((2048,), 60.0, 4),
    ((256, 2048), 60.0, 2),
    ((256, 2048), 27.0, 4),  # one after the other, two of them would be late
])  # fmt: skip
def test_long_steps_reserve_half_of_the_ranks_while_shorter_ones_come_in(
    make, request_of, table_cost, lately, deadline_s, num_steps_started
):
    """Four requests of five steps of 5 s, on four ranks; a 256x256 that comes may have to wait for the end of one."""
    cost = table_cost({256: {1: 0.02}, 2048: {1: 5.0}}, {256: 0.01, 2048: 0.1})
    waiting = [encoded(request_of(2048, num_steps=5, request_id=name, deadline_s=deadline_s)) for name in "abcd"]
    state = State(tuple(waiting), (), (0, 1, 2, 3), cost, lately=tuple(request_of(side) for side in lately))
    started = denoise_tasks(make("lookahead:widen=off", cost, 4).plan(state, 0.0))
    assert list(started.values()) == [(1, 1)] * num_steps_started


def test_what_could_still_be_in_time_fills_before_what_cannot(policy, request_of, flux):
    """Two need all ranks for the same 3.7 s: one gets them, the other waits ahead of a late one for any hole."""
    rivals = [encoded(request_of(2048, request_id=name, deadline_s=3.9)) for name in "ab"]
    late = encoded(request_of(1024, request_id="late", deadline_s=-1.0))
    state = State((late, *rivals), (), RANKS, flux)
    assert denoise_tasks(policy.plan(state, 0.0)) == {"a": (8, 2)}
    flight = InFlight(0, Task(("a",), DECODE, (0,)), 0.0, 0.25)
    running = encoded(rivals[0].request, 28, (0,), is_running=True)
    state = State((late, running, encoded(rivals[1].request)), (flight,), RANKS, flux)
    assert list(denoise_tasks(policy.plan(state, 0.0))) == ["b", "late"]


def test_one_large_request_gives_way_to_several_small_ones(policy, request_of, flux, make):
    """The large one has the earliest deadline and needs 8 ranks until it; then the small ones would all be late."""
    large = encoded(request_of(2048, request_id="large", deadline_s=3.7))
    small = [encoded(request_of(1024, request_id=f"s{i}", deadline_s=4.8)) for i in range(8)]
    state = State((large, *small), (), RANKS, flux)
    assert set(denoise_tasks(make("lookahead:promote=off", flux).plan(state, 0.0))) == {"large"}
    assert "large" not in denoise_tasks(policy.plan(state, 0.0))


def test_priority_classes_are_never_mixed(policy, request_of, flux):
    """The same, but the large one is of an earlier class."""
    large = encoded(request_of(2048, request_id="large", deadline_s=3.7))
    small = [encoded(request_of(1024, request_id=f"s{i}", deadline_s=4.8, priority=1)) for i in range(8)]
    assert set(denoise_tasks(policy.plan(State((large, *small), (), RANKS, flux), 0.0))) == {"large"}


def test_encode_and_decode_are_part_of_the_reservation(policy, request_of, flux):
    """Late is what cannot be encoded, denoised and decoded in time: 0.021 + 3.424 + 0.251 s."""
    other = encoded(request_of(2048, request_id="other", deadline_s=4.3))
    for deadline_s, runs in ((3.75, False), (3.6, True)):
        new = Trajectory(request_of(2048, request_id="new", deadline_s=deadline_s))
        plan = policy.plan(State((new, other), (), RANKS, flux), 0.0)
        assert ("new" in {task.members[0] for task in plan.tasks}) is not runs


def test_more_requests_than_reservations_all_get_their_turn(policy, drive, request_of, flux):
    requests = [request_of(1024, request_id=f"r{i}", deadline_s=30.0) for i in range(3 * MIN_RESERVED)]
    assert drive(policy, requests, flux, is_pure_checked=False).attained(requests) == 1.0


def test_a_larger_pool_reserves_for_more_requests(make, request_of, flux):
    """16 of 2048 in 7 s need 4 ranks each, all 64: whoever had no reservation would take 8 and leave none to others."""
    requests = tuple(encoded(request_of(2048, request_id=f"r{i}", deadline_s=7.0)) for i in range(16))
    plan = make("lookahead:widen=off", flux, 64).plan(State(requests, (), tuple(range(64)), flux), 0.0)
    assert denoise_tasks(plan) == {f"r{i}": (4, 1) for i in range(16)}
    assert [num_reserved(num_ranks) for num_ranks in (2, 8, 64, 1024)] == [12, 12, 64, 1024]


def test_nothing_starts_on_a_full_pool(policy, request_of, flux):
    running = encoded(request_of(2048, request_id="running"), 3, RANKS, is_running=True)
    flight = InFlight(0, Task(("running",), DENOISE, RANKS, 2), 0.0, 0.25)
    assert policy.plan(State((running, encoded(request_of(256))), (flight,), RANKS, flux), 0.1) == Plan()


@pytest.mark.parametrize("is_skewed", [False, True])
def test_attains_more_than_rounds_and_the_list_schedulers(is_skewed, drive, make, poisson, flux):
    requests = poisson(36, 150, seed=11, is_skewed=is_skewed)
    attained = {
        spec: drive(make(spec, flux), requests, flux, is_pure_checked=False).attained(requests)
        for spec in ("lookahead", "tetriserve", "edf", "edf-best-fit", "srtf", "sjf", "rssp")
    }
    best_other = max(value for spec, value in attained.items() if spec != "lookahead")
    assert attained["lookahead"] >= best_other + 0.03


def test_widening_earns_its_place(drive, make, poisson, flux):
    def attained(spec):
        runs = [poisson(36, 150, seed=seed, is_skewed=True) for seed in (1, 2)]
        return sum(drive(make(spec, flux), run, flux, is_pure_checked=False).attained(run) for run in runs) / 2

    assert attained("lookahead") >= attained("lookahead:widen=off") + 0.01


def test_a_lone_late_request_starts_on_all_ranks_where_its_steps_at_fewer_are_too_long(make, request_of, table_cost):
    cost = table_cost({512: {1: 2.0, 2: 0.75}}, {512: 0.1})
    state = State((encoded(request_of(512, deadline_s=-1.0)),), (), (0, 1), cost)
    assert [task.degree for task in make("lookahead", cost, 2).plan(state, 0.0).tasks] == [2]
