"""Ranks, and the sets of them that work together."""

from __future__ import annotations


def aligned_groups(num_ranks: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """Disjoint blocks of `degree` neighbouring ranks; neighbours share the fastest links.

    >>> aligned_groups(4, 2)
    ((0, 1), (2, 3))
    """
    return tuple(tuple(range(start, start + degree)) for start in range(0, num_ranks - degree + 1, degree))
