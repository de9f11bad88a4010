"""A controller in virtual time: an event heap in place of a clock, and tasks that end as they are said to.

Simulations and forecasts are both driven by it. They differ in how long a task takes (what the true cost model says and
some noise; what the controller expects) and in what is noted (outcomes; the tasks themselves).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import assert_never

from tetriserve.control.controller import Controller
from tetriserve.core.events import (
    CloseCancelled,
    Event,
    FailRequest,
    FinishRequest,
    ForgetRequest,
    StartTask,
    TimerFired,
    WakeAt,
)


class VirtualPool:
    """Drives `controller` from `now` (seconds since the engine started) on. Of several events at one time the first
    expected goes first, and a timer that is due then needs no decision of its own.
    """

    def __init__(
        self,
        controller: Controller,
        now: float,
        *,
        start: Callable[[StartTask], tuple[float, Event]],
        finish: Callable[[FinishRequest], None],
        blur: float = 0.0,
    ) -> None:
        """
        Args:
            start: asked of each task that starts when and how it ends.
            finish: told of each request that ends.
            blur: events within `blur * t` of each other, t seconds after the beginning, are followed by one decision; 0
                for a decision after each, as live.
        """
        self.controller = controller
        self.now = now
        self._begin_s = now
        self._start = start
        self._finish = finish
        self._blur = blur
        self._events: list[tuple[float, int, Event]] = []
        self._num_expected = 0
        self._timer_s = math.inf

    @property
    def is_at_rest(self) -> bool:
        """Whether no event is to come but the timer, so that no task runs."""
        return not self._events

    def handle(self, *events: Event) -> None:
        """What happens now, followed by one decision."""
        for command in self.controller.handle_all(events, self.now):
            match command:
                case StartTask():
                    self.expect(*self._start(command))
                case WakeAt(time_s):
                    self._timer_s = max(time_s, self.now)
                case FinishRequest():
                    self._finish(command)
                case FailRequest() | CloseCancelled() | ForgetRequest():
                    pass  # no client waits for an answer, and there is no state to drop
                case _:
                    assert_never(command)

    def expect(self, time_s: float, event: Event) -> None:
        """`event` is to come: the end of a task that runs, for one."""
        heapq.heappush(self._events, (time_s, self._num_expected, event))
        self._num_expected += 1

    def advance(self, until_s: float = math.inf) -> bool:
        """Handle what happens next, and answer whether anything does by `until_s`."""
        time_s = min(self._events[0][0], self._timer_s) if self._events else self._timer_s
        if time_s > until_s or time_s == math.inf:
            return False
        self.now = max(self.now, time_s)
        if self._timer_s <= self.now:
            self._timer_s = math.inf
        self.handle(*(self._landing() or (TimerFired(),)))
        return True

    def _landing(self) -> list[Event]:
        """The events that make up this moment."""
        until_s = self.now + self._blur * (self.now - self._begin_s)
        landing: list[Event] = []
        while self._events and (self._events[0][0] < until_s or (not landing and self._events[0][0] <= self.now)):
            landing.append(heapq.heappop(self._events)[2])
        return landing
