"""Packing of one round: which requests run now, and how wide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Option(NamedTuple):
    """One way to run a request in the round.

    width: ranks that it takes, at least 1.
    survives: whether the request can still meet its deadline after the round.
    """

    width: int
    survives: bool


class OptionGroup(NamedTuple):
    """The options for one request, of which at most one is taken, and whether it survives when none is."""

    options: Sequence[Option]
    survives_deferred: bool


@dataclass(frozen=True, slots=True, order=True)
class Objective:
    """What a packing is worth, compared field by field.

    num_survivors: requests that can still meet their deadlines after the round (TetriServe, Algorithm 1).
    num_running: requests that run. Without it, "defer" scores like "run" for as long as the fastest degree would still
        save the request, and everything drifts until only the widest groups save anything.
    num_unused: ranks left over, for others or for scale-up.
    urgency: sum over the requests that run of their urgency: 1 for the last group, 2 for the one before it, and so on.
    """

    num_survivors: int
    num_running: int
    num_unused: int
    urgency: int


def objective(groups: Sequence[OptionGroup], chosen: Sequence[int | None], capacity: int) -> Objective:
    """The worth of `chosen`: per group the index of its option, or None to defer it."""
    survivors = sum(
        group.survives_deferred if index is None else group.options[index].survives
        for group, index in zip(groups, chosen, strict=True)
    )
    running = [position for position, index in enumerate(chosen) if index is not None]
    used = sum(group.options[index].width for group, index in zip(groups, chosen, strict=True) if index is not None)
    return Objective(survivors, len(running), capacity - used, sum(len(groups) - position for position in running))


ARRAY_CAPACITY = 32
"""From this capacity on the rows of the dynamic program are arrays; below it, lists are quicker."""

_Gain = tuple[int, int]
"""The width of an option, and what taking it adds to the objective."""


def pack_round(groups: Sequence[OptionGroup], capacity: int) -> tuple[int | None, ...]:
    """Choose at most one option per group, of total width <= `capacity`, with the greatest `objective`.

    TetriServe, Algorithm 1: a group knapsack by dynamic programming over capacities 0..N, in one row of values that
    each group rewrites from the top down, with back-pointers to recover the choice. O(groups * options * capacity).

    Args:
        groups: one per request, the most urgent first.
        capacity: ranks to fill.

    Returns:
        Per group the index of the option taken, or None.
    """
    # The four parts of the objective as digits of one integer, so that comparing integers compares objectives.
    most_running = min(len(groups), capacity)
    unused_unit = 1 + most_running * len(groups)
    running_unit = unused_unit * (capacity + 1)
    survivor_unit = running_unit * (most_running + 1)

    gains: list[list[_Gain]] = []
    for position, (options, survives_deferred) in enumerate(groups):
        run = running_unit + len(groups) - position
        gains.append(
            [
                (width, run - width * unused_unit + (survives - survives_deferred) * survivor_unit)
                for width, survives in options
            ]
        )
    fits_int64 = survivor_unit * (most_running + 1) < 2**63
    taken = (_taken_by_array if capacity >= ARRAY_CAPACITY and fits_int64 else _taken_by_list)(gains, capacity)

    chosen: list[int | None] = [None] * len(groups)
    room = capacity
    for position in range(len(groups) - 1, -1, -1):
        index = int(taken[position][room])
        if index >= 0:
            chosen[position] = index
            room -= groups[position].options[index].width
    return tuple(chosen)


def _taken_by_list(gains: Sequence[Sequence[_Gain]], capacity: int) -> Sequence[Sequence[int]]:
    """Per group and room: the index of the option that is best taken there, or -1."""
    values = [0] * (capacity + 1)
    rows = []
    for options in gains:
        taken = [-1] * (capacity + 1)
        for room in range(capacity, 0, -1):
            best = values[room]
            for index, (width, gain) in enumerate(options):
                if width <= room and values[room - width] + gain > best:
                    best = values[room - width] + gain
                    taken[room] = index
            values[room] = best
        rows.append(taken)
    return rows


def _taken_by_array(gains: Sequence[Sequence[_Gain]], capacity: int) -> Sequence[Sequence[int]]:
    """The same for all rooms at once."""
    import numpy as np  # not needed at all by a pool of few ranks, and slow to load

    values = np.zeros(capacity + 1, dtype=np.int64)
    rows = np.full((len(gains), capacity + 1), -1, dtype=np.int8)
    for taken, options in zip(rows, gains, strict=True):
        before = values.copy()
        for index, (width, gain) in enumerate(options):
            if width <= capacity:
                added = before[:-width] + gain
                is_better = added > values[width:]
                values[width:][is_better] = added[is_better]
                taken[width:][is_better] = index
    return rows  # type: ignore[return-value]
