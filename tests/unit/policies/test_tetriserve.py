"""What the round policy promises, with numbers: the pitfalls, priority classes, and rounds."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetriserve.core.plan import InFlight, Plan, State, Task
from tetriserve.core.stages import DECODE, DENOISE
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.packing import pack_round
from tetriserve.policies.rounds import RoundClock, Window, round_lengths
from tetriserve.policies.tetriserve import options_of, pack_candidates
from tetriserve.policies.triage import Sorter

ROUND_S = 5 * 0.1218 + 0.001
RANKS = tuple(range(8))
STEPS_2048 = {1: 0.76, 2: 0.4086, 4: 0.2184, 8: 0.1218}


def encoded(request, steps_done=0, holders=(), *, is_running=False):
    return replace(Trajectory.at(request, 1, steps_done), holders=holders, is_running=is_running)


def in_flight(request_of, end_s, rank):
    """A narrow request whose task on `rank` ends at `end_s`, and with it the round."""
    running = encoded(request_of(512, request_id="running"), 5, (rank,), is_running=True)
    return running, InFlight(0, Task(("running",), DENOISE, (rank,), 14), 0.0, end_s)


def denoise_tasks(plan):
    return {task.members[0]: (task.degree, task.num_steps) for task in plan.tasks if task.stage == DENOISE}


def test_late_requests_come_last_and_on_one_rank(make, request_of, flux):
    """Pitfall 1: six late ones, all with earlier deadlines, against one that needs 8 ranks now."""
    late = [encoded(request_of(1024, request_id=f"late{i}", deadline_s=1.0)) for i in range(6)]
    pressed = encoded(request_of(2048, request_id="pressed", deadline_s=3.8))
    policy = make("tetriserve:step_granularity=5", flux)
    plan = policy.plan(State((*late, pressed), (), RANKS, flux), 0.0)
    assert denoise_tasks(plan) == {"pressed": (8, 5)}

    on_time = encoded(request_of(1024, request_id="on_time", deadline_s=2.5))
    plan = policy.plan(State((*late, on_time), (), RANKS, flux), 0.0)
    assert denoise_tasks(plan) == {"on_time": (2, 6)} | {f"late{i}": (1, 4) for i in range(6)}


def test_late_requests_widen_only_into_ranks_that_would_idle(make, request_of, flux):
    late = encoded(request_of(1024, request_id="late", deadline_s=1.0))
    state = State((late,), (), RANKS, flux)
    assert denoise_tasks(make("tetriserve", flux).plan(state, 0.0)) == {"late": (8, 15)}
    assert denoise_tasks(make("tetriserve:scale_up=off", flux).plan(state, 0.0)) == {"late": (1, 4)}


def test_eight_ranks_assemble_for_the_one_that_needs_them(drive, make, request_of, flux):
    """Pitfall 2: a 2048 needs degree 8 for 3.4 of its 4.6 s, amid narrow requests that would refill what they free."""
    narrow = [request_of(512, request_id=f"n{i}", arrival_s=0.13 * i, deadline_s=0.13 * i + 12.0) for i in range(40)]
    wide = request_of(2048, request_id="wide", arrival_s=1.0, deadline_s=5.8)
    run = drive(make("tetriserve", flux), [*narrow, wide], flux)
    assert run.finish_s["wide"] <= 5.8
    assert run.mean_degree("wide") >= 7
    assert run.attained(narrow) >= 0.9


def test_a_short_request_waits_for_no_boundary(drive, make, request_of, flux):
    """Pitfall 3: encode 20 ms, 28 steps of 17.5 ms, decode 5 ms, four starts of 1 ms, across one boundary."""
    for arrival_s in (0.0, 0.1, 0.3, 0.55):
        run = drive(make("tetriserve", flux), [request_of(256, arrival_s=arrival_s, deadline_s=arrival_s + 1.5)], flux)
        assert run.finish_s["r"] - arrival_s <= 0.02 + 28 * 0.0175 + 0.005 + 4 * 0.001 + 0.025


def test_decode_starts_at_once_in_mid_round_on_a_rank_that_holds_the_latents(make, request_of, flux):
    done = replace(Trajectory.at(request_of(256, deadline_s=1.5), 1, 28), holders=(5,))
    plan = make("tetriserve", flux).plan(State((done,), (), RANKS, flux), 0.4)
    assert plan.tasks == (Task(("r",), DECODE, (5,)),)


def test_a_step_longer_than_a_round_starts_at_any_event(drive, make, request_of, flux):
    """Pitfall 4: seven of eight ranks are gone; a step of the largest shape takes 0.76 s, a round 0.61 s."""
    policy = make("tetriserve", flux)
    state = State((encoded(request_of(2048, deadline_s=60.0)),), (), (3,), flux)
    for now in (0.0, 0.25, 0.6):
        assert policy.plan(state, now).tasks == (Task(("r",), DENOISE, (3,), 1),)
    run = drive(policy, [request_of(2048)], flux, num_ranks=1)
    assert run.finish_s["r"] == pytest.approx(0.021 + 28 * 0.761 + 0.251)


def test_a_degree_whose_step_spans_rounds_is_left_alone_when_others_fit(drive, make, request_of, flux):
    """Late, it runs as narrow as it can: at 2, because a step at 1 takes 0.76 s and a round 0.61 s."""
    run = drive(make("tetriserve:scale_up=off", flux), [request_of(2048, deadline_s=1.0)], flux)
    assert {task.degree for task in run.denoise("r")} == {2}


def test_a_step_that_fits_a_round_but_not_the_rest_of_this_one_waits_for_its_end(make, request_of, flux):
    running, flight = in_flight(request_of, ROUND_S, 0)
    state = State((running, encoded(request_of(2048, deadline_s=60.0))), (flight,), RANKS, flux)
    assert make("tetriserve", flux).plan(state, 0.55) == Plan(wake_at=pytest.approx(ROUND_S))


def test_a_step_across_rounds_is_packed_like_any_other(make, request_of, table_cost):
    """A takes 0.9 s a step, B 0.1 s, the round 0.5 s: two steps of A end by 1.85 s only when the first starts now."""
    cost = table_cost({256: {1: 0.9}, 512: {1: 0.1}}, {256: 0.0, 512: 0.0}, switch_s=0.0)
    policy = make("tetriserve", cost, 1)
    assert policy.clock.round_s == pytest.approx(0.5)
    patient = encoded(request_of(512, request_id="b", deadline_s=1.6, num_steps=5))
    for deadline_s, runs in ((1.85, {"a": (1, 1)}), (1.75, {"b": (1, 5)})):
        pressed = encoded(request_of(256, request_id="a", deadline_s=deadline_s, num_steps=2))
        assert denoise_tasks(policy.plan(State((patient, pressed), (), (0,), cost), 0.0)) == runs


def test_so_close_to_the_end_of_a_round_that_not_even_starting_fits_it_waits(make, request_of, table_cost):
    cost = table_cost({256: {1: 0.004}, 512: {1: 0.004}}, {256: 0.01, 512: 0.01}, switch_s=0.03)
    policy = make("tetriserve", cost, 2)
    assert policy.clock.round_s == pytest.approx(0.05)
    running, flight = in_flight(request_of, 0.05, 1)
    state = State((running, encoded(request_of(256))), (flight,), (0, 1), cost)
    assert policy.plan(state, 0.045) == Plan(wake_at=pytest.approx(0.05))


def test_a_late_decode_does_not_hold_a_rank_beyond_the_end_of_a_round(make, request_of, flux):
    policy = make("tetriserve", flux)
    running, flight = in_flight(request_of, ROUND_S, 0)
    late = replace(Trajectory.at(request_of(2048, deadline_s=0.1), 1, 28), holders=(5,))
    state = State((running, late), (flight,), RANKS, flux)
    assert policy.plan(state, 0.3).tasks == (Task(("r",), DECODE, (5,)),)
    assert policy.plan(state, 0.5) == Plan(wake_at=pytest.approx(ROUND_S))


def test_slack_is_not_slept_away(drive, make, request_of, flux):
    """Pitfall 5: with deadlines an hour away all of it runs at once, none waits for its last moment."""
    requests = [request_of(1024, request_id=f"r{i}", deadline_s=3600.0) for i in range(8)]
    run = drive(make("tetriserve", flux), requests, flux)
    assert max(run.finish_s.values()) <= 7.0


def test_scale_up_looks_past_slower_degrees(make, request_of, table_cost):
    """Pitfall 6: 512x512 at 1.18, 1.23, 1.01 and 0.77 s."""
    cost = table_cost({512: {1: 1.18, 2: 1.23, 4: 1.01, 8: 0.77}}, {512: 0.01})
    state = State((encoded(request_of(512)),), (), RANKS, cost)
    assert denoise_tasks(make("tetriserve:step_granularity=5", cost).plan(state, 0.0)) == {"r": (8, 5)}
    assert denoise_tasks(make("tetriserve:step_granularity=5,scale_up=off", cost).plan(state, 0.0)) == {"r": (1, 3)}


def test_a_lower_priority_class_goes_first_although_the_other_is_more_urgent(make, request_of, flux):
    first = encoded(request_of(2048, request_id="first", deadline_s=4.2, priority=0))
    second = encoded(request_of(2048, request_id="second", deadline_s=3.8, priority=1))
    policy = make("tetriserve", flux)
    assert set(denoise_tasks(policy.plan(State((second, first), (), RANKS, flux), 0.0))) == {"first"}
    same_class = encoded(request_of(2048, request_id="first", deadline_s=4.2, priority=1))
    assert set(denoise_tasks(policy.plan(State((second, same_class), (), RANKS, flux), 0.0))) == {"second"}


def test_priority_orders_encode_too(make, request_of, flux):
    requests = [request_of(256, request_id=f"p{p}", deadline_s=9.0 - p, priority=p) for p in (2, 0, 1)]
    plan = make("tetriserve", flux, 2).plan(State(tuple(map(Trajectory, requests)), (), (0, 1), flux), 0.0)
    assert [task.members[0] for task in plan.tasks] == ["p0", "p1"]


def test_a_request_stays_on_its_ranks_while_its_degree_stays(drive, make, poisson, flux):
    requests = poisson(36, 80, seed=4)

    def kept_share(spec):
        run = drive(make(spec, flux), requests, flux, is_pure_checked=False)
        pairs = [
            (one.ranks, two.ranks)
            for request in requests
            for one, two in pairwise(run.denoise(request.request_id))
            if one.degree == two.degree < 8
        ]
        assert len(pairs) >= 30
        return sum(one == two for one, two in pairs) / len(pairs)

    preserved = kept_share("tetriserve")
    assert preserved >= 0.9
    assert kept_share("tetriserve:placement=off") <= preserved - 0.1


def test_what_starts_in_mid_round_ends_with_the_round(drive, make, poisson, flux):
    policy = make("tetriserve", flux)
    run = drive(policy, poisson(45, 60, seed=2), flux)
    denoise = [(start, end) for start, end, task in run.tasks if task.stage == DENOISE]
    num_mid_round = 0
    for start, end in denoise:
        assert end - start <= policy.clock.round_s + policy.clock.overrun_s + 1e-9
        others = [other_end for other_start, other_end in denoise if other_start < start < other_end]
        if others and max(others) > start + policy.clock.early_s:
            num_mid_round += 1
            assert end <= max(others) + 1e-6
    assert num_mid_round >= 8


def test_ranks_about_to_come_free_are_waited_for(make, request_of, flux):
    policy = make("tetriserve", flux)
    wide = encoded(request_of(2048, request_id="wide", deadline_s=6.0))

    def plan(end_s, now):
        running, flight = in_flight(request_of, end_s, 0)
        return policy.plan(State((running, wide), (flight,), RANKS, flux), now)

    for end_s in (ROUND_S + 0.004, ROUND_S - 0.004):
        assert plan(end_s, ROUND_S + 0.002) == Plan(wake_at=pytest.approx(end_s + 0.1 * ROUND_S))
    assert plan(ROUND_S + 0.3, ROUND_S + 0.002).tasks
    assert plan(ROUND_S + 0.004, 1.11 * ROUND_S + 0.004).tasks


def test_a_pool_at_rest_starts_a_round_at_once_whenever_that_is(make, request_of, flux):
    for now in (0.0, 0.3, ROUND_S, 5.17):
        state = State((encoded(request_of(2048, deadline_s=now + 3.8)),), (), RANKS, flux)
        plan = make("tetriserve", flux).plan(state, now)
        assert denoise_tasks(plan) == {"r": (8, 5)}
        assert plan.wake_at == pytest.approx(now + ROUND_S)


def test_rounds_hold_whole_steps_at_each_degree_and_none_is_longer_than_a_request_can_wait():
    """2048x2048 takes 0.1218 s a step at degree 8, 0.2184 at 4, 0.4086 at 2, and at 1 more than any round."""

    def lengths(slack_s):
        return [round(length_s - 0.001, 6) for length_s in round_lengths(STEPS_2048, 0.001, slack_s)]

    assert lengths(math.inf) == lengths(0.62) == [5 * 0.1218, 2 * 0.2184, 0.4086]
    assert lengths(0.3) == [2 * 0.1218, 0.2184]
    assert lengths(0.2) == lengths(-1.0) == [0.1218]
    assert round_lengths({1: 0.004}, 0.001, 0.0) == (0.05,)


def test_a_round_is_as_long_as_whole_steps_of_the_degree_that_the_most_urgent_need(make, request_of, flux):
    """Two 2048x2048 are in time side by side: 28 steps at degree 4 take 6.12 s, one after the other 6.82 s."""
    both = tuple(encoded(request_of(2048, request_id=name, deadline_s=6.58)) for name in "ab")
    state = State(both, (), RANKS, flux)
    plan = make("tetriserve", flux).plan(state, 0.0)
    assert denoise_tasks(plan) == {"a": (4, 2), "b": (4, 2)}
    assert plan.wake_at == pytest.approx(2 * 0.2184 + 0.001)
    plan = make("tetriserve:step_granularity=5", flux).plan(state, 0.0)
    assert denoise_tasks(plan) == {"a": (8, 5)}  # 0.61 s would hold two steps at degree 4, too

    alone = State(both[:1], (), RANKS, flux)
    assert make("tetriserve:scale_up=off", flux).plan(alone, 0.0).wake_at == pytest.approx(2 * 0.2184 + 0.001)
    pressed = State((encoded(request_of(2048, deadline_s=3.8)),), (), RANKS, flux)
    assert make("tetriserve", flux).plan(pressed, 0.0).wake_at == pytest.approx(ROUND_S)


def test_the_length_of_a_round_that_has_begun_stays(make, request_of, flux):
    """What starts in mid-round ends with it, although the requests that now wait would have wanted another length."""
    running, flight = in_flight(request_of, ROUND_S, 0)
    waiting = tuple(encoded(request_of(2048, request_id=name, deadline_s=7.0)) for name in "ab")
    plan = make("tetriserve", flux).plan(State((running, *waiting), (flight,), RANKS, flux), 0.15)
    assert plan.wake_at == pytest.approx(ROUND_S)


@pytest.mark.parametrize("is_skewed", [False, True])
@pytest.mark.parametrize("rate_per_min", [24, 36])
def test_attains_more_than_every_fixed_degree_and_fcfs(rate_per_min, is_skewed, drive, make, poisson, flux):
    requests = poisson(rate_per_min, 150, seed=11, is_skewed=is_skewed)
    attained = {
        spec: drive(make(spec, flux), requests, flux, is_pure_checked=False).attained(requests)
        for spec in ("tetriserve", "fixed:1", "fixed:2", "fixed:8", "fcfs")
    }
    best_other = max(value for spec, value in attained.items() if spec != "tetriserve")
    assert attained["tetriserve"] >= best_other + 0.05


def test_every_mechanism_earns_its_place(drive, make, poisson, flux):
    """The paper's rounds, uniform mix at 36 per minute, two seeds: switching scale-up or fill off costs attainment."""

    def attained(spec):
        runs = [poisson(36, 150, seed=seed) for seed in (1, 2)]
        return sum(drive(make(spec, flux), run, flux, is_pure_checked=False).attained(run) for run in runs) / 2

    full = attained("tetriserve:step_granularity=5")
    assert full > attained("tetriserve:step_granularity=5,scale_up=off")
    assert full > attained("tetriserve:step_granularity=5,fill=off")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    num_requests=st.integers(1, 80),
    capacity=st.integers(0, 12),
    latest_s=st.sampled_from([6.0, 12.0, 60.0]),
)
def test_packing_the_head_of_the_queue_is_packing_all_of_it(seed, num_requests, capacity, latest_s, flux, request_of):
    rng = random.Random(seed)
    requests = [
        request_of(rng.choice([256, 512, 1024, 2048]), request_id=f"r{i}", deadline_s=rng.uniform(2.0, latest_s))
        for i in range(num_requests)
    ]
    clock = RoundClock.of(ROUND_S)
    state = State(tuple(encoded(request, rng.randrange(28)) for request in requests), (), RANKS, flux)
    candidates = Sorter(clock).triage(state, 0.0).on_time
    window = Window(clock, clock.round_at((), 0.0), 0.0, flux.switch_s)
    if not candidates:
        return
    packed, deferred = pack_candidates(candidates, capacity, window)
    priced = [options_of(candidate, window) for candidate in candidates]
    everything = pack_round([group for group, _ in priced], capacity)
    expected = [choices[index] for (_, choices), index in zip(priced, everything, strict=True) if index is not None]
    assert packed == expected
    assert deferred == [c for c, index in zip(candidates, everything, strict=True) if index is None]
