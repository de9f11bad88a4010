"""How far a forecast may be trusted: learnt from promises that were made."""

from __future__ import annotations

LEAST_SPARE = 0.05
MOST_SPARE = 1.0
_KEPT = 0.95
"""The share of forecasts that shall be off by no more than the spare."""
_RATE = 0.1


class Spare:
    """What a promise keeps in hand, as a fraction of the time until the forecast finish.

    It follows the quantile `_KEPT` of how late images were, relative to what was forecast of them: each that was later
    than the spare allows widens it, the others narrow it a little (stochastic approximation, Robbins and Monro, 1951).
    So promises hold on a machine whose tasks vary, or that others use too; on a steady one little is kept.
    """

    def __init__(self) -> None:
        self.fraction = LEAST_SPARE

    def learn(self, arrival_s: float, predicted_finish_s: float, finish_s: float) -> None:
        """An image that came at `arrival_s` ended; its finish had been forecast when it was promised."""
        is_later = finish_s - predicted_finish_s > self.fraction * (predicted_finish_s - arrival_s)
        self.fraction += _RATE * (_KEPT if is_later else _KEPT - 1)
        self.fraction = min(max(self.fraction, LEAST_SPARE), MOST_SPARE)
