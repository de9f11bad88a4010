"""What observed times say about a profile: the ratio of observed to profiled seconds, stage by stage."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from tetriserve.core.request import Shape

RANGE = (0.1, 10.0)
"""Of a correction. What would lie outside means that the profile is another machine's."""
MAX_SHAPES = 256
"""Entries of a table by shape: clients choose sizes, and a server runs for months."""
_LEARNING_RATE = 0.2
_MAX_SURPRISE = 2.0
"""One observation counts as at most this many times what was expected: a hiccup must not condemn a degree."""
_DRIFT_RATE = 0.02
"""How fast a degree that is not observed any more follows the shape's others: else it would never be tried again."""

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Corrections:
    """Factors on a profile's times, as exponential moving averages; immutable.

    encode: one for all requests. steps: by shape and degree. decode: by shape. The `MAX_SHAPES` last observed are kept,
    the longest unobserved first.
    """

    encode: float = 1.0
    steps: Mapping[tuple[Shape, int], float] = field(default_factory=dict)
    decode: Mapping[Shape, float] = field(default_factory=dict)

    def of_step(self, shape: Shape, degree: int) -> float:
        """A degree never observed for a shape shares the mean of the shape's observed degrees: what slows a shape down
        (a hot machine, contended cores) mostly slows it at every degree."""
        own = self.steps.get((shape, degree))
        if own is not None:
            return own
        others = [factor for (known, _), factor in self.steps.items() if known == shape]
        return sum(others) / len(others) if others else 1.0

    def of_decode(self, shape: Shape) -> float:
        return self.decode.get(shape, 1.0)

    def after_encode(self, ratio: float) -> Corrections:
        """These after one observation; `ratio` is observed over profiled time."""
        return replace(self, encode=_moved(self.encode, ratio))

    def after_step(self, shape: Shape, degree: int, ratio: float) -> Corrections:
        after = _moved(self.of_step(shape, degree), ratio)
        drifted = {
            key: factor + (_DRIFT_RATE * (after - factor) if key[0] == shape else 0.0)
            for key, factor in self.steps.items()
        }
        return replace(self, steps=_with(drifted, (shape, degree), after))

    def after_decode(self, shape: Shape, ratio: float) -> Corrections:
        return replace(self, decode=_with(self.decode, shape, _moved(self.of_decode(shape), ratio)))


def make_room(remembered: dict[Any, Any]) -> None:
    """Forget the oldest entry when there are `MAX_SHAPES`."""
    if len(remembered) >= MAX_SHAPES:
        remembered.pop(next(iter(remembered)), None)  # a thread that forecasts may have been quicker


def _moved(before: float, ratio: float) -> float:
    low, high = RANGE
    ratio = min(high, _MAX_SURPRISE * before, max(low, ratio))  # in this order NaN counts as `low`
    return before + _LEARNING_RATE * (ratio - before)


def _with(table: Mapping[_Key, float], key: _Key, factor: float) -> dict[_Key, float]:
    """`table` with `key` as the last observed."""
    changed = {known: value for known, value in table.items() if known != key}
    make_room(changed)
    changed[key] = factor
    return changed
