"""How much a promise keeps in hand: learnt from promises that were made."""

from __future__ import annotations

from tetriserve.core.request import Request

LEAST_SPARE = 0.05
FIRST_SPARE = 0.25
MOST_SPARE = 0.5
_KEPT = 0.98
"""The share of promises that shall be kept."""
_RATE = 0.1
_HALF_LIFE_S = 2.0


class Spare:
    """What a promise keeps in hand, as a fraction of the time until the forecast finish.

    Each promise that was broken widens it, each that was kept narrows it a little, so that it settles where `_KEPT` of
    them are kept (stochastic approximation of a quantile; Robbins and Monro, 1951). So promises hold on a machine whose
    tasks vary, or that others use too, and on a steady one little is kept in hand. While no promise is open nothing can
    be learnt, and what was learnt fades to the first guess: else nothing might ever be promised again.
    """

    def __init__(self) -> None:
        self.fraction = FIRST_SPARE
        self._deadlines_s: dict[str, float] = {}
        self._looked_at_s = 0.0

    def note_promise(self, request: Request) -> None:
        self._deadlines_s[request.request_id] = request.deadline_s

    def note_end(self, request_id: str, now: float) -> None:
        """A request has its image, or needs none any more."""
        self.note_time(now)
        if self._deadlines_s.pop(request_id, None) is not None:
            self._learn(is_kept=True)

    def note_time(self, now: float) -> None:
        """Broken promises count when their deadlines pass: late requests are served last, perhaps much later."""
        if not self._deadlines_s:
            faded = 0.5 ** ((now - self._looked_at_s) / _HALF_LIFE_S)
            self.fraction = FIRST_SPARE + faded * (self.fraction - FIRST_SPARE)
        self._looked_at_s = now
        for request_id, deadline_s in list(self._deadlines_s.items()):
            if deadline_s < now:
                del self._deadlines_s[request_id]
                self._learn(is_kept=False)

    def _learn(self, is_kept: bool) -> None:
        self.fraction += _RATE * (_KEPT - is_kept)
        self.fraction = min(max(self.fraction, LEAST_SPARE), MOST_SPARE)
