"""Ranks, the sets of them that work together, and what each may run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class StageRanks:
    """Which ranks may run which kinds of stage: a kind that `limits` does not name runs on every rank.

    limits: the allowed ranks of a kind, by kind; see `of`.
    """

    limits: tuple[tuple[str, frozenset[int]], ...] = ()

    @classmethod
    def of(cls, limits: Mapping[str, Iterable[int]]) -> StageRanks:
        """
        >>> StageRanks.of({"encode": [0]}).among("encode", (0, 1, 2))
        (0,)
        """
        return cls(tuple(sorted((kind, frozenset(ranks)) for kind, ranks in limits.items())))

    def __bool__(self) -> bool:
        """Whether any kind of stage is limited."""
        return bool(self.limits)

    @cached_property
    def by_kind(self) -> Mapping[str, frozenset[int]]:
        """The allowed ranks of each kind that is limited."""
        return dict(self.limits)

    def allows(self, kind: str, ranks: Iterable[int]) -> bool:
        """Whether a stage of this kind may run on all of `ranks`."""
        allowed = self.by_kind.get(kind)
        return allowed is None or allowed.issuperset(ranks)

    def among(self, kind: str, ranks: Collection[int]) -> tuple[int, ...]:
        """Those of `ranks` that may run a stage of this kind, in their order."""
        allowed = self.by_kind.get(kind)
        return tuple(ranks) if allowed is None else tuple(rank for rank in ranks if rank in allowed)


ANYWHERE = StageRanks()
"""Every rank runs every stage."""


def aligned_groups(num_ranks: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """Disjoint blocks of `degree` neighbouring ranks; neighbours share the fastest links.

    >>> aligned_groups(4, 2)
    ((0, 1), (2, 3))
    """
    return tuple(tuple(range(start, start + degree)) for start in range(0, num_ranks - degree + 1, degree))
