"""List scheduling and resolution-specific degrees: who goes first, and how wide."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tetriserve.core.plan import InFlight, State, Task
from tetriserve.core.stages import DENOISE, ENCODE
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.rssp import efficient_enough_degree

RANKS = tuple(range(8))


def encoded(request, steps_done=0, holders=(), *, is_running=False):
    return replace(Trajectory.at(request, 1, steps_done), holders=holders, is_running=is_running)


def degrees(plan):
    return {task.members[0]: task.degree for task in plan.tasks}


def test_edf_gives_the_most_urgent_its_fastest_degree_and_the_next_what_is_left(make, request_of, flux):
    first = encoded(request_of(1024, request_id="first", deadline_s=5.0))
    second = encoded(request_of(2048, request_id="second", deadline_s=6.0))
    assert degrees(make("edf", flux).plan(State((second, first), (), RANKS, flux), 0.0)) == {"first": 8}
    assert degrees(make("edf", flux).plan(State((second, first), (), RANKS[:6], flux), 0.0)) == {
        "first": 4,
        "second": 2,
    }


def test_best_fit_takes_the_smallest_degree_in_time_and_widens_the_most_urgent(make, request_of, flux):
    """1024 in 5 s: 4.3 s of steps at degree 1. 2048 in 7 s: 6.1 s at 4. Then one rank is left, and 1024 takes it."""
    first = encoded(request_of(1024, request_id="first", deadline_s=5.0))
    second = encoded(request_of(2048, request_id="second", deadline_s=7.0))
    third = encoded(request_of(256, request_id="third", deadline_s=8.0))
    policy = make("edf-best-fit", flux)
    plan = policy.plan(State((second, third, first), (), RANKS, flux), 0.0)
    assert degrees(plan) == {"first": 2, "second": 4, "third": 2}
    alone = policy.plan(State((third,), (), RANKS, flux), 0.0)
    assert degrees(alone) == {"third": 2}, "256 is slower at 4 and 8"


def test_srtf_lets_a_shorter_one_overtake_and_sjf_does_not(make, request_of, flux):
    begun = encoded(request_of(2048, request_id="begun"), 4, RANKS)
    new = encoded(request_of(1024, request_id="new"), 0, (0,))
    state = State((begun, Trajectory(new.request)), (), (0,), flux)
    assert [task.members[0] for task in make("srtf", flux, 1).plan(state, 0.0).tasks] == ["new"]
    assert [task.members[0] for task in make("sjf", flux, 1).plan(state, 0.0).tasks] == ["begun"]
    nearly_done = encoded(request_of(2048, request_id="begun"), 27, RANKS)
    state = State((new, nearly_done), (), (0,), flux)
    assert [task.members[0] for task in make("srtf", flux, 1).plan(state, 0.0).tasks] == ["begun"]


def test_rssp_chooses_the_degrees_that_the_paper_chose(flux):
    chosen = {size: efficient_enough_degree(times) for size, times in flux.steps.items()}
    assert chosen == {256: 1, 512: 1, 1024: 2, 2048: 8}


def test_rssp_makes_everyone_wait_behind_the_head_unless_it_backfills(make, request_of, flux):
    running = encoded(request_of(1024, request_id="running"), 5, (0, 1), is_running=True)
    flight = InFlight(0, Task(("running",), DENOISE, (0, 1), 5), 0.0, 0.5)
    head = Trajectory(request_of(2048, request_id="head"))
    small = Trajectory(request_of(256, request_id="small"))
    state = State((running, head, small), (flight,), RANKS, flux)
    assert make("rssp", flux).plan(state, 0.1).tasks == ()
    assert make("rssp:backfill=on", flux).plan(state, 0.1).tasks == (Task(("small",), ENCODE, (2,)),)


def test_rssp_holds_the_block_from_encode_to_decode(drive, make, request_of, flux):
    requests = [request_of(1024, request_id=f"r{i}") for i in range(5)]
    run = drive(make("rssp", flux), requests, flux)
    for index in range(4):
        tasks = [task for _, _, task in run.tasks if task.members[0] == f"r{index}"]
        block = (2 * index, 2 * index + 1)
        assert {task.ranks for task in tasks if task.stage == DENOISE} == {block}
        assert {task.ranks for task in tasks if task.stage != DENOISE} == {block[:1]}
    first_start = min(start for start, _, task in run.tasks if task.members[0] == "r4")
    assert first_start == pytest.approx(run.finish_s["r0"])


def test_rssp_narrows_when_no_whole_block_lives(drive, make, request_of, flux, death):
    run = drive(make("rssp", flux), [request_of(2048)], flux, deaths=[death(1.0, 6, 9.0)])
    assert {task.ranks for task in run.denoise("r")} == {RANKS, (0, 1, 2, 3)}


def test_rssp_holds_the_whole_block_while_its_first_rank_encodes(make, request_of, flux):
    encoding = Trajectory(request_of(2048, request_id="encoding"), is_running=True)
    flight = InFlight(0, Task(("encoding",), ENCODE, (0,)), 0.0, 0.021)
    state = State((encoding, Trajectory(request_of(256))), (flight,), RANKS, flux)
    for spec in ("rssp", "rssp:backfill=on"):
        assert make(spec, flux).plan(state, 0.01).tasks == ()


def test_rssp_passes_over_a_shape_that_no_living_rank_can_serve(make, request_of, table_cost):
    cost = table_cost({256: {1: 0.02}, 512: {2: 0.1}}, {256: 0.01, 512: 0.01})
    wide, small = Trajectory(request_of(512, request_id="wide")), Trajectory(request_of(256, request_id="small"))
    plan = make("rssp", cost, 2).plan(State((wide, small), (), (1,), cost), 0.0)
    assert plan.tasks == (Task(("small",), ENCODE, (1,)),)
