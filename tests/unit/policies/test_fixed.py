"""The baselines: who waits for whom, on which ranks, and what a dead rank does to them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tetriserve.core.plan import InFlight, State, Task
from tetriserve.core.stages import DENOISE
from tetriserve.core.trajectory import Trajectory


def test_fcfs_runs_one_request_at_a_time_at_its_fastest_degree(drive, make, request_of, flux):
    requests = [request_of(height, request_id=str(height), arrival_s=0.001 * i) for i, height in enumerate((2048, 256))]
    run = drive(make("fcfs", flux), requests, flux)
    assert {task.ranks for task in run.denoise("2048")} == {tuple(range(8))}
    assert {task.ranks for task in run.denoise("256")} == {(0, 1)}
    spans = sorted((start, end) for start, end, _ in run.tasks)
    assert all(end <= start + 1e-9 for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    # 28 steps of 0.1218 s in 7 tasks of 4, encode and decode, each task started for 1 ms
    assert run.finish_s["2048"] == pytest.approx(0.021 + 28 * 0.1218 + 7 * 0.001 + 0.251)


def test_fixed_keeps_a_request_on_its_block_from_encode_to_decode(drive, make, request_of, flux):
    requests = [request_of(1024, request_id=f"r{i}", arrival_s=0.01 * i) for i in range(4)]
    run = drive(make("fixed:4", flux), requests, flux)
    for index, block in enumerate([(0, 1, 2, 3), (4, 5, 6, 7)]):
        tasks = [task for _, _, task in run.tasks if task.members[0] == f"r{index}"]
        assert {task.ranks for task in tasks if task.stage == DENOISE} == {block}
        assert {task.ranks for task in tasks if task.stage != DENOISE} == {block[:1]}
    starts = {}
    for start, _, task in run.tasks:
        starts.setdefault(task.members[0], start)
    assert starts["r2"] == run.finish_s["r0"]
    assert starts["r3"] == run.finish_s["r1"]


def test_a_block_stays_reserved_while_its_request_waits_between_tasks(make, request_of, flux):
    """Request a is between tasks on ranks 0 and 1, so that c must not take them, nor b's that are busy."""
    policy = make("fixed:2", flux, 4)
    a, b, c = (request_of(1024, request_id=name) for name in "abc")
    trajectories = (
        Trajectory(c),
        replace(Trajectory.at(a, 1, 5), holders=(0, 1)),
        replace(Trajectory.at(b, 1, 5), holders=(2, 3), is_running=True),
    )
    flight = InFlight(0, Task(("b",), DENOISE, (2, 3), 5), 0.0, 0.5)
    plan = policy.plan(State(trajectories, (flight,), (0, 1, 2, 3), flux), 0.1)
    assert plan.tasks == (Task(("a",), DENOISE, (0, 1), 5),)


def test_a_request_that_lost_its_block_takes_the_next_free_one_but_nobody_elses(make, request_of, flux):
    """Rank 0 is dead: moved needs a new block, before new, which arrived earlier; (2, 3) belongs to owner."""
    policy = make("fixed:2", flux, 6)
    new, moved, owner = (Trajectory(request_of(1024, request_id=name)) for name in ("new", "moved", "owner"))
    moved = replace(Trajectory.at(moved.request, 1, 5), holders=(1,))
    owner = replace(Trajectory.at(owner.request, 1, 5), holders=(2, 3))
    plan = policy.plan(State((new, moved, owner), (), (1, 2, 3, 4, 5), flux), 0.1)
    assert {task.members[0]: task.ranks for task in plan.tasks} == {"moved": (4, 5), "owner": (2, 3)}


def test_a_denoise_task_lasts_about_half_a_second(drive, make, request_of, flux):
    run = drive(make("fixed:1", flux), [request_of(1024), request_of(2048, request_id="big")], flux)
    assert {task.num_steps for task in run.denoise("r")} == {3, 1}
    assert [task.num_steps for task in run.denoise("big")] == [1] * 28


def test_a_shape_that_cannot_run_at_the_degree_uses_the_widest_below(drive, make, request_of, table_cost):
    cost = table_cost({256: {1: 0.02, 2: 0.02}, 512: {1: 0.1, 2: 0.06, 4: 0.04}}, {256: 0.01, 512: 0.01})
    run = drive(make("fixed:4", cost), [request_of(256), request_of(512, request_id="wide")], cost)
    assert {task.ranks for task in run.denoise("r")} == {(0, 1)}
    assert {task.ranks for task in run.denoise("wide")} == {(4, 5, 6, 7)}


def test_a_request_whose_block_lost_a_rank_moves_to_a_free_block(drive, make, request_of, flux, death):
    policy = make("fixed:4", flux)
    run = drive(policy, [request_of(2048)], flux, deaths=[death(2.0, 1, 50.0)])
    blocks = [task.ranks for task in run.denoise("r")]
    assert set(blocks) == {(0, 1, 2, 3), (4, 5, 6, 7)}
    assert blocks == sorted(blocks)


def test_when_no_whole_block_is_left_narrower_ones_serve(drive, make, request_of, flux, death):
    run = drive(make("fixed:8", flux), [request_of(2048)], flux, deaths=[death(1.0, 6, 9.0)])
    assert {task.ranks for task in run.denoise("r")} == {tuple(range(8)), (0, 1, 2, 3)}
