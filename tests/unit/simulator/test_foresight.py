"""Quotes: what is promised holds in the same forecast, and at nobody's expense."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetriserve.control import Controller
from tetriserve.control.foresight import Foresight
from tetriserve.control.spare import LEAST_SPARE
from tetriserve.control.whatif import forecast
from tetriserve.core.events import Submitted, WorkerJoined
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.policies import make_policy

POLICIES = ["tetriserve", "lookahead", "fixed:1", "fcfs", "rssp", "srtf", "edf", "edf-best-fit"]
HEIGHTS = (256, 512, 1024, 2048)


class Pool:
    """A controller with requests submitted at 0, and quotes for more."""

    def __init__(self, spec, cost, requests, num_ranks):
        self.new_policy = lambda: make_policy(spec, cost, num_ranks=num_ranks or 1, shapes=cost.profile.shapes)
        self.foresight = Foresight(self.new_policy)
        self.controller = Controller(self.new_policy(), cost)
        for rank in range(num_ranks):
            self.controller.handle(WorkerJoined(rank), 0.0)
        for request in requests:
            self.controller.handle(Submitted(request), 0.0)
        self.without = self.foresight.forecast(self.controller, 0.0)

    def quote(self, *requests):
        return self.foresight.quote(self.controller, 0.0, requests, self.without)


@pytest.fixture(scope="module")
def pool_of(flux):
    return lambda spec, requests, num_ranks=8: Pool(spec, flux, requests, num_ranks)


@pytest.fixture(scope="module")
def asked(request_of):
    def build(height, deadline_s, *, name="new", num_steps=10):
        return request_of(0.0, deadline_s, height=height, name=name, num_steps=num_steps)

    return build


kinds = st.tuples(st.sampled_from(HEIGHTS), st.floats(0.05, 40.0), st.integers(1, 28))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    spec=st.sampled_from(POLICIES),
    queue=st.lists(kinds, max_size=14),
    kind=kinds,
    num_images=st.integers(1, 3),
    num_ranks=st.sampled_from([1, 2, 8]),
)
def test_the_earliest_deadline_is_feasible_if_asked_for_at_once(
    pool_of, asked, spec, queue, kind, num_images, num_ranks
):
    requests = [
        asked(height, deadline_s, name=f"r{number}", num_steps=num_steps)
        for number, (height, deadline_s, num_steps) in enumerate(queue)
    ]
    pool = pool_of(spec, requests, num_ranks)
    height, deadline_s, num_steps = kind
    images = [asked(height, deadline_s, name=f"n{number}", num_steps=num_steps) for number in range(num_images)]
    quote = pool.quote(*images)
    assert quote.deadline_s == deadline_s
    assert [len(image.degrees) for image in quote.requests] == [num_steps] * num_images
    if quote.is_feasible:
        assert (1 + LEAST_SPARE) * quote.finish_s <= deadline_s
        assert quote.earliest_deadline_s <= deadline_s
    else:
        assert quote.earliest_deadline_s > deadline_s
    if quote.earliest_deadline_s < math.inf:
        again = pool.quote(*[dataclasses.replace(image, deadline_s=quote.earliest_deadline_s) for image in images])
        assert again.is_feasible
        assert again.finish_s <= quote.earliest_deadline_s


def test_an_empty_pool_quotes_the_time_alone_and_a_little_to_spare_to_the_tick(pool_of, asked, flux):
    pool = pool_of("fixed:1", [])
    request = asked(512, 100.0)
    quote = pool.quote(request)
    alone_s = (
        flux.times(request, request.stage_of(ENCODE))[1]
        + 10 * flux.times(request, request.stage_of(DENOISE))[1]
        + flux.times(request, request.stage_of(DECODE))[1]
        + 3 * flux.switch_s
    )
    assert quote.is_feasible
    assert quote.finish_s == pytest.approx(alone_s)
    assert quote.earliest_deadline_s == pytest.approx((1 + LEAST_SPARE) * alone_s, abs=1e-3)
    assert quote.earliest_deadline_s * 1000 == pytest.approx(round(quote.earliest_deadline_s * 1000), abs=1e-6)
    assert quote.position == 0
    assert quote.requests[0].degrees == (1,) * 10


def test_what_would_make_others_late_is_not_feasible_even_if_it_is_in_time_itself(pool_of, asked):
    first = asked(1024, 1e6, name="first")
    alone_s = forecast_end(pool_of("edf", [first], 1), "first")
    pool = pool_of("edf", [dataclasses.replace(first, deadline_s=alone_s + 0.01)], 1)
    quote = pool.quote(asked(256, alone_s - 0.01))
    assert quote.finish_s <= quote.deadline_s
    assert not quote.is_feasible
    assert alone_s < quote.earliest_deadline_s < math.inf


def test_who_is_late_anyway_is_no_reason_to_refuse(pool_of, asked):
    pool = pool_of("edf", [asked(1024, 0.01, name="late")], 1)
    quote = pool.quote(asked(256, 60.0))
    assert quote.is_feasible


def test_the_position_counts_those_that_go_first(pool_of, asked):
    pool = pool_of("fcfs", [asked(256, 100.0, name=f"r{number}") for number in range(4)])
    assert pool.quote(asked(256, 100.0)).position == 3  # one of the four runs


def test_without_a_rank_nothing_can_be_promised(pool_of, asked):
    quote = pool_of("tetriserve", [], 0).quote(asked(256, 100.0))
    assert not quote.is_feasible
    assert quote.finish_s == quote.earliest_deadline_s == math.inf


def test_images_that_come_together_share_the_pool(pool_of, asked):
    pool = pool_of("fcfs", [])
    one = pool.quote(asked(256, 100.0))
    three = pool.quote(*(asked(256, 100.0, name=f"n{number}") for number in range(3)))
    assert three.finish_s == pytest.approx(3 * one.finish_s)
    assert three.finish_s == max(image.finish_s for image in three.requests)


def test_quoting_changes_nothing(pool_of, asked):
    pool = pool_of("lookahead", [asked(1024, 3.0, name=f"r{number}") for number in range(5)])
    before = pool.controller.state
    assert pool.quote(asked(512, 2.0)) == pool.quote(asked(512, 2.0))
    assert pool.controller.state == before


def forecast_end(pool, name):
    return forecast(pool.controller, 0.0, pool.new_policy()).finish_s[name]
