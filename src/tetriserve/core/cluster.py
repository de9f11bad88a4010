"""Ranks and the groups of them that are worth keeping warm."""

from __future__ import annotations

from collections.abc import Sequence


def aligned_groups(num_ranks: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """Disjoint blocks of `degree` neighbouring ranks; neighbours share the fastest links.

    >>> aligned_groups(4, 2)
    ((0, 1), (2, 3))
    """
    return tuple(tuple(range(start, start + degree)) for start in range(0, num_ranks - degree + 1, degree))


def warm_groups(num_ranks: int, degrees: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The aligned groups of every degree above 1, narrow ones first: few enough to warm at start (section 5)."""
    return tuple(group for degree in sorted(degrees) if degree > 1 for group in aligned_groups(num_ranks, degree))
