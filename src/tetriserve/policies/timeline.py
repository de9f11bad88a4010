"""Future free capacity: how many ranks nobody has claimed, and when."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tetriserve.core.cluster import Role

EPSILON_S = 1e-9
"""Rounding slack in comparisons of sums of seconds."""

NEVER_S = 1e12
"""Stands for infinity, and can still be divided into a number of steps."""


class Piece(NamedTuple):
    """`degree` ranks from `start_s` to `end_s`, for `num_steps` steps (0 for short stages).

    role: the ranks that may run it, where not every rank may.
    """

    start_s: float
    end_s: float
    degree: int
    num_steps: int = 0
    role: Role | None = None


class Timeline:
    """Free ranks as a step function of time: `free[i]` of them from `times[i]` to `times[i + 1]`, the last for ever.

    Which ranks they are does not matter here: a group may be any set. Where only some ranks may run a stage, `narrower`
    has a timeline of each set of `StageRanks.unions` alone: no more of it can be claimed by the roles that lie in it.
    Times that are nearer to the breakpoint before
    them than `resolution`, as a fraction of how far ahead they lie, count as that breakpoint: this bounds the number of
    breakpoints by the logarithm of the time that is planned, however many ranks there are.
    """

    def __init__(
        self,
        times: Sequence[float],
        free: Sequence[int],
        resolution: float = 0.0,
        narrower: Mapping[Role, Timeline] | None = None,
    ) -> None:
        self.times = list(times)
        self.free = list(free)
        self.resolution = resolution
        self.narrower = narrower or {}

    @classmethod
    def of(
        cls, now: float, num_idle: int, releases: Iterable[tuple[float, int]], *, resolution: float = 0.0
    ) -> Timeline:
        """`num_idle` ranks from `now` on, and more at each of `releases`, pairs of a time and a number of ranks."""
        times, free = [now], [num_idle]
        for time_s, num_ranks in sorted(releases):
            num_idle += num_ranks
            if time_s - times[-1] <= resolution * (time_s - now):
                free[-1] = num_idle
            else:
                times.append(time_s)
                free.append(num_idle)
        return cls(times, free, resolution)

    def copy(self) -> Timeline:
        narrower = {ranks: timeline.copy() for ranks, timeline in self.narrower.items()}
        return Timeline(self.times, self.free, self.resolution, narrower)

    def without(self, num_ranks: int) -> Timeline:
        """What is left if `num_ranks` of the whole pool stay free; `narrower` is unchanged. Not to be claimed in."""
        free = [max(0, each - num_ranks) for each in self.free]
        return Timeline(self.times, free, self.resolution, self.narrower)

    def of_role(self, role: Role | None) -> Timeline:
        """What is free for stages of this role; to be read, not to be claimed in."""
        if role is None:
            return self
        both = [self, *(timeline for ranks, timeline in self.narrower.items() if role <= ranks)]
        times = sorted({time_s for timeline in both for time_s in timeline.times})
        return Timeline(times, [min(timeline.free[timeline.index_at(at)] for timeline in both) for at in times])

    def index_at(self, time_s: float) -> int:
        """The segment that holds `time_s`; a breakpoint that only rounding separates from it counts as reached."""
        return max(0, bisect_right(self.times, time_s + EPSILON_S) - 1)

    def free_until(self, num_ranks: int) -> list[float]:
        """Per degree from 0 to `num_ranks`: until when that many ranks are free, counted from the start."""
        until = [NEVER_S] * (num_ranks + 1)
        lowest = num_ranks
        for time_s, free in zip(self.times, self.free, strict=True):
            while lowest > free:
                until[lowest] = time_s
                lowest -= 1
        return until

    def earliest(self, duration_s: float, from_s: float, num_ranks: int = 1) -> float:
        """The first moment from `from_s` on at which `num_ranks` are free for `duration_s`."""
        times, free = self.times, self.free
        start_s: float | None = None
        for position in range(self.index_at(from_s), len(free)):
            if start_s is not None and times[position] >= start_s + duration_s - EPSILON_S:
                return start_s
            if free[position] < num_ranks:
                start_s = None
            elif start_s is None:
                start_s = max(from_s, times[position])
        return NEVER_S if start_s is None else start_s

    def claim(self, pieces: Iterable[Piece]) -> None:
        """Take the ranks of `pieces` out."""
        free = self.free
        for piece in pieces:
            start_s, end_s, degree, _, role = piece
            first, last = self._split(start_s), self._split(end_s)
            for position in range(first, last):
                free[position] -= degree
            if role is not None:
                for ranks, timeline in self.narrower.items():
                    if role <= ranks:
                        timeline.claim([piece])

    def _split(self, time_s: float) -> int:
        """The index of the segment that starts at `time_s`, made if need be."""
        times = self.times
        position = self.index_at(time_s)
        if time_s - times[position] > EPSILON_S + self.resolution * (time_s - times[0]):
            position += 1
            times.insert(position, time_s)
            self.free.insert(position, self.free[position - 1])
        return position
