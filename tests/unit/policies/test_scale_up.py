"""Ranks left over widen what runs."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.scale_up import Choice, scale_up

NON_MONOTONE = {1: 1.18, 2: 1.23, 4: 1.01, 8: 0.77}
SCALING = {1: 0.4, 2: 0.2, 4: 0.1, 8: 0.06}
FLAT = {1: 0.02, 2: 0.02, 4: 0.021, 8: 0.025}


def choice(times, degree, num_steps, remaining):
    request = Request(
        request_id="r",
        prompt="",
        shape=Shape(512, 512),
        stages=image_stages(remaining),
        seed=0,
        arrival_s=0.0,
        deadline_s=9.0,
    )
    return Choice(Trajectory.at(request, 1, 0), times, degree, num_steps)


def fit(available_s):
    return lambda step_s: int(available_s / step_s)


def widths(choices):
    return [(each.degree, each.num_steps) for each in choices]


def test_looks_past_a_degree_that_is_slower():
    widened, spare = scale_up([choice(NON_MONOTONE, 1, 3, 20)], 7, fit(4.0))
    assert (widths(widened), spare) == ([(8, 5)], 0)
    widened, spare = scale_up([choice(NON_MONOTONE, 1, 3, 20)], 3, fit(4.1))
    assert (widths(widened), spare) == ([(4, 4)], 0)
    widened, spare = scale_up([choice(NON_MONOTONE, 1, 3, 20)], 2, fit(4.0))
    assert (widths(widened), spare) == ([(1, 3)], 2)


def test_goes_to_the_one_that_benefits_most():
    widened, spare = scale_up([choice(FLAT, 1, 20, 20), choice(SCALING, 1, 1, 20)], 3, fit(0.4))
    assert (widths(widened), spare) == ([(1, 20), (4, 4)], 0)


def test_what_one_leaves_goes_to_the_next():
    widened, spare = scale_up([choice(SCALING, 4, 4, 20), choice(SCALING, 1, 1, 20)], 5, fit(0.4))
    assert (widths(widened), spare) == ([(4, 4), (4, 4)], 2)


def test_steps_are_never_more_than_remain():
    widened, _ = scale_up([choice(SCALING, 1, 1, 3)], 7, fit(1.0))
    assert widths(widened) == [(8, 3)]


def test_ranks_stay_free_when_nobody_gets_faster():
    assert scale_up([choice(FLAT, 1, 20, 20)], 7, fit(0.4)) == ([choice(FLAT, 1, 20, 20)], 7)


def widest_benefit_first(choices, spare, steps_that_fit):
    """By definition: again and again the one change of all that saves most time, then the narrowest, then the first."""
    widened = list(choices)
    while True:
        offers = []
        for number, each in enumerate(widened):
            for degree, step_s in each.times.items():
                num_steps = min(each.trajectory.remaining_steps, steps_that_fit(step_s))
                saved_s = num_steps * (each.times[each.degree] - step_s)
                if 0 < degree - each.degree <= spare and saved_s > 0:
                    offers.append((-saved_s, degree - each.degree, number, degree, num_steps))
        if not offers:
            return widened, spare
        _, added, number, degree, num_steps = min(offers)
        spare -= added
        widened[number] = widened[number]._replace(degree=degree, num_steps=num_steps)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    wanted=st.lists(
        st.tuples(st.sampled_from([NON_MONOTONE, SCALING, FLAT]), st.sampled_from([1, 2]), st.integers(1, 30)),
        max_size=8,
    ),
    spare=st.integers(0, 20),
    available_s=st.floats(0.05, 4.0),
)
def test_always_takes_the_change_that_helps_most(wanted, spare, available_s):
    choices = [choice(times, degree, 1, remaining) for times, degree, remaining in wanted]
    expected, left = widest_benefit_first(choices, spare, fit(available_s))
    widened, still_spare = scale_up(choices, spare, fit(available_s))
    assert widths(widened) == widths(expected)
    assert still_spare == left
