"""How much a promise keeps in hand: learnt from promises that were made."""

from __future__ import annotations

from tetriserve.core.request import Request

LEAST_SPARE = 0.05
MOST_SPARE = 1.0
_KEPT = 0.95
"""The share of promises that shall be kept."""
_RATE = 0.1


class Spare:
    """What a promise keeps in hand, as a fraction of the time until the forecast finish.

    Each promise that was broken widens it, each that was kept narrows it a little, so that it settles where `_KEPT` of
    them are kept (stochastic approximation of a quantile; Robbins and Monro, 1951). So promises hold on a machine whose
    tasks vary, or that others use too, and on a steady one little is kept in hand.
    """

    def __init__(self) -> None:
        self.fraction = LEAST_SPARE
        self._deadlines_s: dict[str, float] = {}

    def note_promise(self, request: Request) -> None:
        self._deadlines_s[request.request_id] = request.deadline_s

    def note_end(self, request_id: str, now: float) -> None:
        """A request has its image, or needs none any more."""
        self.note_time(now)
        if self._deadlines_s.pop(request_id, None) is not None:
            self._learn(is_kept=True)

    def note_time(self, now: float) -> None:
        """Broken promises count when their deadlines pass: late requests are served last, perhaps much later."""
        for request_id, deadline_s in list(self._deadlines_s.items()):
            if deadline_s < now:
                del self._deadlines_s[request_id]
                self._learn(is_kept=False)

    def _learn(self, is_kept: bool) -> None:
        self.fraction += _RATE * (_KEPT - is_kept)
        self.fraction = min(max(self.fraction, LEAST_SPARE), MOST_SPARE)
