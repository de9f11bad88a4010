"""Forecasts of a live engine are shared; quotes are made of fresh ones."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tetriserve.control import Controller
from tetriserve.core.errors import DeadlineInfeasible, QueueFull
from tetriserve.core.events import Cancelled, Result, Submitted, TaskFinished, TensorRef, TimerFired, WorkerJoined
from tetriserve.core.forecast import Forecast, Quote, QuotedRequest
from tetriserve.core.plan import Plan
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.engine.observers import Occurred
from tetriserve.engine.outlook import MAX_AGE_S, MAX_WAIT_S, Outlook

REQUEST = Request(
    request_id="r", prompt="", shape=Shape(256, 256), stages=image_stages(1), seed=0, arrival_s=0.0, deadline_s=5.0
)  # fmt: skip
QUOTE = Quote(
    is_feasible=False, arrival_s=2.0, deadline_s=3.0, earliest_deadline_s=7.5, position=0,
    requests=(QuotedRequest(finish_s=7.0, degrees=()),),
)  # fmt: skip


class Idle:
    def plan(self, state, now):
        return Plan()


class Noted:
    """A foresight that only notes what it is asked."""

    def __init__(self):
        self.forecasts = []
        self.quotes = []

    def forecast(self, controller, now):
        self.forecasts.append((controller, now))
        return Forecast(now=now, runs=(), finish_s={})

    def quote(self, controller, now, requests, without, *, spare, is_brief):
        self.quotes.append((now, tuple(requests), without.now))
        return QUOTE


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def foresight():
    return Noted()


@pytest.fixture
def controller():
    return Controller(Idle(), cost=None)


@pytest.fixture
def outlook(foresight, controller, clock):
    return Outlook(foresight, controller, clock)


async def test_all_who_ask_within_its_age_share_one_forecast(outlook, foresight, clock):
    first, second = await asyncio.gather(outlook.forecast(), outlook.forecast())
    clock.now = MAX_AGE_S
    assert first is second is await outlook.forecast()
    clock.now = MAX_AGE_S + 0.01
    assert (await outlook.forecast()).now == clock.now
    assert len(foresight.forecasts) == 2


async def test_one_who_gives_up_takes_the_forecast_from_nobody(outlook):
    leaving, staying = asyncio.create_task(outlook.forecast()), asyncio.create_task(outlook.forecast())
    await asyncio.sleep(0)
    leaving.cancel()
    assert (await staying).now == 0.0


@pytest.mark.parametrize("event", [Submitted(REQUEST), Cancelled("r"), WorkerJoined(1)])
async def test_a_quote_is_compared_with_a_forecast_since_the_last_coming_and_going(outlook, foresight, clock, event):
    await outlook.forecast()
    clock.now = 0.5
    outlook.observe(Occurred(event, 0.4))
    assert await outlook.quote([REQUEST]) == QUOTE
    assert foresight.quotes == [(0.5, (REQUEST,), 0.5)]


@pytest.mark.parametrize(
    "event", [TaskFinished(1, 0.1, (Result(TensorRef("r", 1), 1, is_stage_over=False),)), TimerFired()]
)
async def test_what_was_foreseen_makes_no_forecast_stale(outlook, foresight, clock, event):
    await outlook.forecast()
    clock.now = 0.5
    outlook.observe(Occurred(event, 0.4))
    await outlook.quote([REQUEST])
    assert foresight.quotes == [(0.5, (REQUEST,), 0.0)]


async def test_the_foresight_gets_a_controller_of_its_own(outlook, foresight, controller):
    await outlook.forecast()
    ((forked, _),) = foresight.forecasts
    assert forked is not controller
    controller.handle(WorkerJoined(3), 0.0)
    assert (forked.state.ranks, controller.state.ranks) == ((), (3,))


def answering(outlook, foresight, monkeypatch, *quotes):
    """From now on `foresight` answers so, and the last answer again."""
    answers = list(quotes)

    def quote(controller, now, requests, without, *, spare, is_brief):
        foresight.quotes.append(is_brief)
        return answers.pop(0) if len(answers) > 1 else answers[0]

    monkeypatch.setattr(foresight, "quote", quote)
    monkeypatch.setattr(outlook._controller, "earliest_finish", lambda request, now: 4.0)
    monkeypatch.setattr("tetriserve.engine.outlook.backlog_s", lambda state: 9.0)


async def promised(outlook, deadline_s=5.0):
    request = replace(REQUEST, deadline_s=deadline_s)
    async with outlook.turn([request]):
        return await outlook.promise([request])


async def test_a_promise_takes_one_brief_quote(outlook, foresight, monkeypatch):
    feasible = replace(QUOTE, is_feasible=True)
    answering(outlook, foresight, monkeypatch, feasible)
    assert await promised(outlook) is feasible
    assert foresight.quotes == [True]


async def test_a_refusal_names_what_can_be_promised_or_when_to_come_back(outlook, foresight, monkeypatch):
    answering(outlook, foresight, monkeypatch, QUOTE, QUOTE, replace(QUOTE, earliest_deadline_s=float("inf")))
    with pytest.raises(
        DeadlineInfeasible, match="a deadline in 1.000 s cannot be promised; one in 5.500 s can"
    ) as refused:
        await promised(outlook)
    assert (refused.value.earliest_deadline_s, refused.value.retry_after_s) == (5.5, 4.5)
    with pytest.raises(
        DeadlineInfeasible, match="a deadline in 1.000 s cannot be promised, nor is a later one"
    ) as refused:
        await promised(outlook)
    assert (refused.value.earliest_deadline_s, refused.value.retry_after_s) == (None, 9.0)
    assert foresight.quotes == [True, False] * 2


async def test_while_others_wait_no_later_deadline_is_looked_for(outlook, foresight, monkeypatch):
    answering(outlook, foresight, monkeypatch, QUOTE)
    ends = await asyncio.gather(*(promised(outlook) for _ in range(4)), return_exceptions=True)
    assert all(isinstance(end, DeadlineInfeasible) for end in ends)
    assert foresight.quotes == [True] * 4 + [False]  # the last one has time


async def test_while_others_wait_the_hopeless_are_refused_without_a_quote(outlook, foresight, monkeypatch):
    answering(outlook, foresight, monkeypatch, replace(QUOTE, is_feasible=True))
    late = [promised(outlook, deadline_s=3.9) for _ in range(9)]
    first, *ends = await asyncio.gather(promised(outlook), *late, return_exceptions=True)
    assert isinstance(first, Quote)
    assert all(isinstance(end, DeadlineInfeasible) and end.retry_after_s == 9.0 for end in ends)
    assert foresight.quotes == [True]
    assert isinstance(await promised(outlook, deadline_s=3.9), Quote)  # alone it is worth a quote


async def test_turns_come_one_after_the_other_and_those_who_would_wait_long_are_refused_at_once(outlook, clock):
    order = []

    async def ask(number):
        async with outlook.turn():
            order.append(number)
            await asyncio.sleep(0)
            clock.now += 0.2
            raise ZeroDivisionError  # a turn that ends in a refusal counts too

    await asyncio.gather(*(ask(number) for number in range(3)), return_exceptions=True)
    assert order == [0, 1, 2]
    # By now a turn is known to take some 0.1 s: two may wait, and the one whose turn it is.
    ends = await asyncio.gather(*(ask(number) for number in range(3, 103)), return_exceptions=True)
    refusals = [end for end in ends if isinstance(end, QueueFull)]
    assert 95 <= len(refusals) <= 98
    assert all(MAX_WAIT_S < refusal.retry_after_s < 1 for refusal in refusals)
    assert order == list(range(103 - len(refusals)))
    with pytest.raises(ZeroDivisionError):
        await ask(103)


async def test_one_who_gives_up_waiting_for_a_turn_leaves_it_to_the_next(outlook):
    entered = []

    async def ask(number):
        async with outlook.turn():
            entered.append(number)
            await asyncio.sleep(0.01)

    first, leaving, last = (asyncio.create_task(ask(number)) for number in range(3))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(first, leaving, last, return_exceptions=True)
    assert entered == [0, 2]
