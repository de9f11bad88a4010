"""Forecasts and quotes of a live engine: computed in threads, forecasts shared, quotes given one at a time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from tetriserve.control.admission import backlog_s
from tetriserve.control.controller import Controller
from tetriserve.control.foresight import Foresight
from tetriserve.control.spare import Spare
from tetriserve.core.errors import DeadlineInfeasible, QueueFull
from tetriserve.core.events import Submitted, TaskFinished, TimerFired
from tetriserve.core.forecast import Forecast, Quote
from tetriserve.core.request import Request
from tetriserve.engine.intake import check_ids
from tetriserve.engine.observers import Observation, Occurred
from tetriserve.workload.outcome import Outcome

MAX_AGE_S = 1.0
"""How old a shared forecast may be; for quotes, besides, nobody may have come or gone since."""
MAX_WAIT_S = 0.25
"""How long a turn may be expected to be away; who would wait longer is refused at once."""
_MEMORY = 0.8
"""Weight of what was known, against the latest, in how long a turn takes."""


class Outlook:
    """The future of one engine. Forecasts are shared among all who ask; all methods are called on the event loop.

    A forecast takes milliseconds of Python, under long queues tens of them. In a thread it holds up the event loop by
    no more than Python's switch interval at a time. What it works on is a fork of the controller, which nobody else
    has, and values that nobody mutates.
    """

    def __init__(self, foresight: Foresight, controller: Controller, clock: Callable[[], float]) -> None:
        self._foresight = foresight
        self._controller = controller
        self._clock = clock
        self._forecast: asyncio.Task[Forecast] | None = None
        self._made_at = -math.inf
        self._is_stale = False
        self._turns = asyncio.Lock()
        self._num_asking = 0
        self._turn_s = 0.0
        self._spare = Spare()

    def observe(self, observation: Observation) -> None:
        """Arrivals and departures are what a forecast does not foresee; promises kept decide on the next ones."""
        match observation:
            case Occurred(TaskFinished() | TimerFired()):
                pass
            case Occurred(event):
                self._is_stale = True
                if isinstance(event, Submitted) and event.promised_finish_s is not None:
                    self._spare.note_promise(event.request)
            case Outcome(request=request):
                self._spare.note_end(request.request_id, self._clock())

    async def forecast(self) -> Forecast:
        """The future of what is there, or was up to `MAX_AGE_S` ago."""
        now = self._clock()
        if self._forecast is None or now > self._made_at + MAX_AGE_S:
            self._made_at, self._is_stale = now, False
            work = asyncio.to_thread(self._foresight.forecast, self._snapshot(), now)
            self._forecast = asyncio.create_task(work)
        return await asyncio.shield(self._forecast)  # others may wait for it too

    @asynccontextmanager
    async def turn(self, hopeful: Sequence[Request] = ()) -> AsyncIterator[None]:
        """One's turn to ask for a quote, and to act on it before anybody else asks: promises must know of each other.

        Nobody waits for long, and of those who want a promise for `hopeful` only who may get one: forecasts take time
        that tasks could use.

        Raises:
            QueueFull: too many wait for theirs.
            DeadlineInfeasible: others have their turn, and even if nothing went to waste the deadline would pass.
        """
        wait_s = self._num_asking * self._turn_s
        if wait_s > MAX_WAIT_S:
            raise QueueFull(f"{self._num_asking} requests wait to hear whether they can be in time", wait_s)
        if self._num_asking and hopeful:
            first = min(hopeful, key=lambda request: request.deadline_s)
            if self._controller.earliest_finish(first, self._clock() + wait_s) > first.deadline_s:
                raise self._refusal(first.arrival_s, first.deadline_s, math.inf)
        self._num_asking += 1
        try:
            async with self._turns:
                start_s = self._clock()
                try:
                    yield
                finally:
                    self._turn_s = _MEMORY * self._turn_s + (1 - _MEMORY) * (self._clock() - start_s)
        finally:
            self._num_asking -= 1

    async def promise(self, requests: Sequence[Request]) -> Quote:
        """A quote by which `requests` will be in time. Ask in turn, and admit them before it ends.

        Raises:
            DeadlineInfeasible: there is none. It names a deadline that can be promised, unless others wait to ask.
        """
        quote = await self.quote(requests, is_brief=True)
        if not quote.is_feasible and self._num_asking == 1:
            quote = await self.quote(requests)
        if not quote.is_feasible:
            raise self._refusal(quote.arrival_s, quote.deadline_s, quote.earliest_deadline_s)
        return quote

    async def quote(self, requests: Sequence[Request], *, is_brief: bool = False) -> Quote:
        """What could be promised to `requests` if they were admitted now; see `Foresight.quote`. Ask in turn.

        Raises:
            InvalidRequest: the id of one is taken.
        """
        if self._is_stale:
            self._forecast = None
        without = await self.forecast()
        self._spare.note_time(self._clock())
        snapshot = self._snapshot()
        check_ids(requests, snapshot.state)
        work = partial(self._foresight.quote, snapshot, self._clock(), requests, without)
        return await asyncio.to_thread(work, spare=self._spare.fraction, is_brief=is_brief)

    def _refusal(self, arrival_s: float, deadline_s: float, earliest_s: float) -> DeadlineInfeasible:
        """`earliest_s` is a deadline that could be promised; infinite: none is known, so come back when all is done."""
        slo_s = deadline_s - arrival_s
        refusal = f"a deadline in {slo_s:.3f} s cannot be promised"
        if math.isinf(earliest_s):
            return DeadlineInfeasible(f"{refusal}, nor is a later one known", None, backlog_s(self._controller.state))
        earliest_s -= arrival_s
        return DeadlineInfeasible(f"{refusal}; one in {earliest_s:.3f} s can", earliest_s, earliest_s - slo_s)

    def _snapshot(self) -> Controller:
        return self._controller.fork(self._controller.policy)
