"""What observed times say about a profile: the ratio of observed to profiled seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tetriserve.core.request import Shape

RANGE = (0.1, 10.0)
"""Of a correction. What would lie outside means that the profile is another machine's."""
MAX_ENTRIES = 1024
"""Of a table: clients choose sizes, and a server runs for months."""
_LEARNING_RATE = 0.2
_MAX_SURPRISE = 2.0
"""One observation counts as at most this many times what was expected: a hiccup must not condemn a degree."""
_DRIFT_RATE = 0.02
"""How fast what is not observed any more follows what is, of the same stage and shape: else it is never tried again."""


class Case(NamedTuple):
    """What a factor is for. shape: None for a stage that takes the same for every size."""

    stage: str
    shape: Shape | None
    degree: int = 1
    batch: int = 1


@dataclass(frozen=True)
class Corrections:
    """Factors on a profile's times, as exponential moving averages; immutable.

    The `MAX_ENTRIES` last observed are kept, the longest unobserved first.
    """

    factors: Mapping[Case, float] = field(default_factory=dict)

    def of(self, case: Case) -> float:
        """A case never observed shares the mean of those observed of its stage and shape: what slows a shape down (a
        hot machine, contended cores) mostly slows it at every degree."""
        own = self.factors.get(case)
        if own is not None:
            return own
        others = [factor for known, factor in self.factors.items() if known[:2] == case[:2]]
        return sum(others) / len(others) if others else 1.0

    def after(self, case: Case, ratio: float) -> Corrections:
        """These after one observation; `ratio` is observed over profiled time."""
        after = _moved(self.of(case), ratio)
        changed = {
            known: factor + (_DRIFT_RATE * (after - factor) if known[:2] == case[:2] else 0.0)
            for known, factor in self.factors.items()
            if known != case
        }
        make_room(changed)
        changed[case] = after
        return Corrections(changed)


def make_room(remembered: dict[Any, Any]) -> None:
    """Forget the oldest entry when there are `MAX_ENTRIES`."""
    if len(remembered) >= MAX_ENTRIES:
        remembered.pop(next(iter(remembered)), None)  # a thread that forecasts may have been quicker


def _moved(before: float, ratio: float) -> float:
    low, high = RANGE
    ratio = min(high, _MAX_SURPRISE * before, max(low, ratio))  # in this order NaN counts as `low`
    return before + _LEARNING_RATE * (ratio - before)
