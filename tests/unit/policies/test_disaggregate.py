"""Ranks set aside for short stages: which, how many, and what runs on them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tetriserve.core.cluster import StageRanks
from tetriserve.core.plan import State
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.disaggregate import divided


@pytest.fixture
def cost(table_cost):
    """Ten steps of a second on one rank; at 512 a decode takes as long as all of them."""
    return table_cost({256: {1: 1.0, 2: 0.6, 4: 0.4}, 512: {1: 1.0, 2: 0.6}}, {256: 0.9, 512: 9.9}, encode=0.1)


@pytest.fixture
def aside_of(cost, request_of):
    """The ranks for steps and for decodes of requests of some heights, all unfinished on `num_ranks`."""

    def find(heights, num_aside=None, num_ranks=8, limits=StageRanks(), **changes):  # noqa: B008  a value
        requests = [
            replace(request_of(height, request_id=f"r{number}", num_steps=10), **changes)
            for number, height in enumerate(heights)
        ]
        state = State(tuple(map(Trajectory, requests)), (), tuple(range(num_ranks)), cost, stage_ranks=limits)
        found, model = divided(state, num_aside), requests[0].model
        return [found.among(model, kind, range(num_ranks)) for kind in (DENOISE, DECODE)]

    return find


def test_as_many_are_set_aside_as_are_asked_for_or_as_the_work_of_short_stages_needs(aside_of):
    assert aside_of([256], num_aside=3) == [(3, 4, 5, 6, 7), (0, 1, 2)]
    assert aside_of([256]) == [(1, 2, 3, 4, 5, 6, 7), (0,)]  # an eleventh of the work
    assert aside_of([512]) == [(4, 5, 6, 7), (0, 1, 2, 3)]  # half of it
    assert aside_of([256, 512]) == [(3, 4, 5, 6, 7), (0, 1, 2)]  # 11 of 31


def test_what_is_left_is_wide_enough_for_every_request(aside_of):
    assert aside_of([512], num_aside=7, degrees=None) == [(7,), (0, 1, 2, 3, 4, 5, 6)]
    assert aside_of([512], num_ranks=1) == [(0,), (0,)]


def test_each_group_of_models_has_its_own_set(aside_of):
    limits = StageRanks.of({("a", ""): range(4), ("b", ""): range(4, 8), ("b", ENCODE): [5]})
    assert aside_of([256], num_aside=4, limits=limits, model="a") == [(2, 3), (0, 1)]
    assert aside_of([256], num_aside=2, limits=limits, model="b") == [(4, 6, 7), (5,)]
    elsewhere = StageRanks.of({("", DENOISE): range(4), ("", ENCODE): [4], ("", DECODE): [5, 6, 7]})
    assert aside_of([256], limits=elsewhere) == [(0, 1, 2, 3), (5, 6, 7)]


def test_steps_and_short_stages_never_run_on_each_others_ranks(make, drive, poisson, flux):
    requests = poisson(40, 40, seed=4)
    run = drive(make("disaggregate:2", flux), requests, flux, is_pure_checked=False)
    used = {
        kind: {rank for _, _, task in run.tasks if task.stage == kind for rank in task.ranks}
        for kind in (ENCODE, DENOISE, DECODE)
    }
    assert used[ENCODE] | used[DECODE] == {0, 1}
    assert used[DENOISE] == set(range(2, 8))


def test_a_short_stage_does_not_wait_for_steps(make, drive, request_of, table_cost):
    """Steps of ten seconds hold all ranks but those set aside; without these an encode waits until one ends."""
    cost = table_cost({256: {1: 10.0}, 512: {1: 0.1}}, {256: 1.0, 512: 1.0}, encode=0.1)
    long = [request_of(256, request_id=f"long{n}", num_steps=5, deadline_s=90.0 + n) for n in range(4)]
    newcomer = request_of(512, request_id="new", arrival_s=5.0, num_steps=1, deadline_s=500.0)
    begin_s = {}
    for spec in ("disaggregate:1", "edf-best-fit"):
        run = drive(make(spec, cost, 4), [*long, newcomer], cost, num_ranks=4)
        (begin_s[spec],) = (
            start_s for start_s, _, task in run.tasks if task.members == ("new",) and task.stage == ENCODE
        )
    assert begin_s["disaggregate:1"] == 5.0
    assert begin_s["edf-best-fit"] > 10.0
