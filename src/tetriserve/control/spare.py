"""How much a promise keeps in hand: learnt from promises that were made."""

from __future__ import annotations

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

    def learn(self, is_kept: bool) -> None:
        """A request that was promised its deadline ended."""
        self.fraction += _RATE * (_KEPT - is_kept)
        self.fraction = min(max(self.fraction, LEAST_SPARE), MOST_SPARE)
