"""The least GPU time of one request inside an interval: known values, and never more than real schedules spend."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from tetriserve.core.request import Shape
from tetriserve.core.stages import DENOISE, image_stages
from tetriserve.policies.allocation import deadline_aware_allocation
from tetriserve.policies.registry import make_policy
from tetriserve.profile import ProfileCost
from tetriserve.profile.bundled import open_profile
from tetriserve.simulator.leastwork import Chain, Leg, chain_of
from tetriserve.simulator.run import simulate


def on_one_rank(seconds: float) -> Leg:
    return Leg(1, (seconds,), (seconds,))


CHAIN = Chain((on_one_rank(1.0), Leg(10, (1.0, 3.0), (6.0, 3.0)), on_one_rank(2.0)))
"""13 s at the fastest; a step costs 6 GPU seconds at the fastest and 3 at three seconds or slower."""


@pytest.mark.parametrize(
    ("window_s", "left_s", "right_s", "work"),
    [
        (13.0, 0.0, 0.0, 1 + 60 + 2),  # no slack: all steps at the fastest
        (33.0, 0.0, 0.0, 1 + 30 + 2),  # 30 s for 10 steps: all at the cheapest
        (99.0, 0.0, 0.0, 1 + 30 + 2),
        (23.0, 0.0, 0.0, 1 + 45 + 2),  # half way between
        (13.0, 0.5, 0.0, 0.5 + 60 + 2),  # half of the head runs before the interval
        (13.0, 3.0, 0.0, 48 + 2),  # the head and two steps before it
        (13.0, 0.0, 1.5, 1 + 60 + 0.5),  # most of the tail after it
        (13.0, 3.0, 4.0, 36),  # head and two steps before, tail and two steps after: six steps at the fastest
        (19.0, 3.0, 4.0, 6 * 4.5),  # the same six steps in twelve seconds
        (26.0, 3.0, 4.0, 6 * 3.0),  # in nineteen: no need to hurry
        (26.0, 6.0, 7.0, 0.0),  # all of it fits outside
        (13.0, 0.0, 13.0, 0.0),  # the interval ends before the window begins
        (20.0, 20.0, 0.0, 0.0),  # it begins after the window ended
        (13.5, 13.0, 0.0, 0.0),  # it touches only what is left when everything is done
    ],
)
def test_known_values(window_s: float, left_s: float, right_s: float, work: float) -> None:
    assert CHAIN.least_work(window_s, left_s, right_s) == pytest.approx(work)


def test_cutting_the_window_in_two_never_adds_work() -> None:
    cuts = np.linspace(0.0, 20.0, 201)
    both = CHAIN.least_work(20.0, 0.0, 20.0 - cuts) + CHAIN.least_work(20.0, cuts, 0.0)
    assert (both <= CHAIN.least_work(20.0, 0.0, 0.0) + 1e-9).all()
    assert both.max() > 30  # and keeps most of it


def test_degrees_above_the_hull_and_wider_than_the_pool_are_left_out(table_cost, request_of) -> None:
    cost = table_cost({256: {1: 1.0, 2: 0.95, 4: 0.4, 8: 0.3}}, encode=0.2, decode=0.5, switch_s=0.1)
    chain = chain_of(request_of(0, 9, num_steps=3), cost, num_ranks=4)
    head, steps, tail = chain.legs
    assert head == Leg(1, (pytest.approx(0.4),), (pytest.approx(0.4),))
    assert steps == Leg(3, (0.4, 1.0), (1.6, 1.0))
    assert tail == Leg(1, (pytest.approx(0.6),), (pytest.approx(0.6),))
    assert chain.fastest_s == pytest.approx(0.4 + 3 * 0.4 + 0.6)


def test_no_degree_fits(table_cost, request_of) -> None:
    assert chain_of(request_of(0, 9), table_cost({256: {2: 1.0}}), num_ranks=1) is None


@pytest.mark.parametrize("side", [256, 512, 1024, 2048])
def test_a_whole_request_costs_what_its_allocation_costs_up_to_a_fraction_of_a_step(side, flux, request_of) -> None:
    request = request_of(0.0, 1.0, num_steps=28, height=side)
    chain = chain_of(request, flux, 8)
    head, steps, tail = chain.legs
    short_s = head.fastest_s + tail.fastest_s
    times = flux.times(request, request.stage_of(DENOISE))
    for window_s in np.linspace(chain.fastest_s + 1e-6, 3 * chain.fastest_s, 50):
        segments = deadline_aware_allocation(28, window_s - short_s, times)
        exact = sum(part.num_steps * part.degree * times[part.degree] for part in segments)
        hull = float(chain.least_work(window_s, 0.0, 0.0)) - short_s
        assert hull <= exact + 1e-6
        assert exact - hull <= max(steps.costs_s)


@pytest.mark.parametrize("spec", ["tetriserve", "fixed:2", "fcfs"])
def test_no_schedule_spends_less_inside_any_interval(spec, flux, workload) -> None:
    requests = workload(mix="skewed", count=80, seed=5)
    policy = make_policy(spec, flux, num_ranks=8, shapes=flux.profile.shapes)
    rng = random.Random(0)
    num_checked = 0
    for outcome in simulate(policy, flux, requests, num_ranks=8):
        request = outcome.request
        if not outcome.is_attained:
            continue
        window_s = request.deadline_s - request.arrival_s
        for _ in range(50):
            begin, end = sorted(rng.uniform(request.arrival_s - 1, request.deadline_s + 1) for _ in range(2))
            left, right = (
                min(max(part, 0.0), window_s) for part in (begin - request.arrival_s, request.deadline_s - end)
            )
            spent = sum(
                max(0.0, min(run.end_s, end) - max(run.start_s, begin)) * run.task.degree for run in outcome.runs
            )
            least = float(chain_of(request, flux, 8).least_work(window_s, left, right))
            assert least <= spent + 1e-9
            num_checked += least > 0
    assert num_checked > 300


WIDE = Chain((on_one_rank(1.0), Leg(10, (1.0, 3.0), (6.0, 3.0)), Leg(1, (2.0, 3.0, 5.0), (8.0, 6.0, 5.0))))
"""With a decode that takes 2, 3 or 5 s at degree 4, 2 or 1. Its first second saves 2 GPU seconds, a step's 1.5."""


@pytest.mark.parametrize(
    ("window_s", "left_s", "right_s", "work"),
    [
        (13.0, 0.0, 0.0, 1 + 60 + 8),
        (14.0, 0.0, 0.0, 1 + 60 + 6),  # the second to spare goes to decode, where it saves most
        (18.0, 0.0, 0.0, 1 + 60 - 4 * 1.5 + 6),  # then to the steps
        (34.0, 0.0, 0.0, 1 + 30 + 6),
        (35.0, 0.0, 0.0, 1 + 30 + 5.5),  # and at last to decode again
        (99.0, 0.0, 0.0, 1 + 30 + 5),
        (13.0, 0.0, 1.0, 1 + 60 + 4),  # half of decode after the interval
        (13.5, 11.0, 0.0, 6.0 + 1.0),  # decode alone, half a second to spare
    ],
)
def test_seconds_to_spare_go_to_the_stage_where_they_save_most(
    window_s: float, left_s: float, right_s: float, work: float
) -> None:
    assert WIDE.least_work(window_s, left_s, right_s) == pytest.approx(work)


def test_a_short_stage_may_run_at_every_degree_that_fits(request_of) -> None:
    wan = ProfileCost(open_profile("wan2.2-ti2v-5b-8xh100"))
    request = dataclasses.replace(request_of(0, 99), shape=Shape(704, 1280, 121), stages=image_stages(50, 2))
    for num_ranks, widest_s in ((2, 7.459), (4, 4.658), (8, 3.258)):
        *_, steps, decode = chain_of(request, wan, num_ranks).legs
        assert decode.times_s[0] == pytest.approx(widest_s + 0.001)
        assert decode.costs_s[-1] == pytest.approx(13.06 + 0.001)
        assert steps.num_steps == 50
        assert steps.costs_s[-1] == pytest.approx(2 * 0.88)
