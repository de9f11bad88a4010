"""Ranks, the sets of them that work together, and what each may run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

Role: TypeAlias = frozenset[int]
"""The ranks that may run a stage where not every rank may. Stages with equal sets compete for the same ranks, whatever
their models and kinds, so that ranks are counted by role."""


@dataclass(frozen=True)
class StageRanks:
    """Which ranks may run which stages: those that all `limits` on a stage allow, and every rank where there is none.

    limits: the allowed ranks by model and kind of stage; see `of`.
    """

    limits: tuple[tuple[tuple[str, str], Role], ...] = ()

    @classmethod
    def of(cls, limits: Mapping[tuple[str, str], Iterable[int]]) -> StageRanks:
        """
        Args:
            limits: by key of a model and kind of stage. An empty key stands for every model, an empty kind for every
                kind.

        >>> StageRanks.of({("", "encode"): [0, 1], ("video", ""): [1, 2]}).among("video", "encode", (0, 1, 2))
        (1,)
        """
        return cls(tuple(sorted(((stage, frozenset(ranks)) for stage, ranks in limits.items()), key=_stage)))

    def __bool__(self) -> bool:
        """Whether any stage is limited."""
        return bool(self.limits)

    def __and__(self, other: StageRanks) -> StageRanks:
        """What both allow."""
        both = dict(self.limits)
        for stage, ranks in other.limits:
            both[stage] = both.get(stage, ranks) & ranks
        return StageRanks.of(both)

    @cached_property
    def kinds(self) -> frozenset[str]:
        """The kinds of stage that some limit names."""
        return frozenset(kind for (_, kind), _ in self.limits if kind)

    @cached_property
    def roles(self) -> frozenset[Role]:
        """The different sets of ranks that limited stages may have."""
        models = {model for (model, _), _ in self.limits}
        found = [self.role(model, kind) for model in ("", *models) for kind in ("", *self.kinds)]
        return frozenset(role for role in found if role is not None)

    @cached_property
    def unions(self) -> tuple[Role, ...]:
        """Every role, and what roles that overlap have together.

        Stages can be given ranks at once if no more ranks are taken within any of these sets, by the roles that lie in
        it, than it has (Hall's theorem). A set that falls apart into others needs no check of its own.
        """
        found = set(self.roles)
        reached = list(self.roles)
        for union in reached:
            wider = {union | role for role in self.roles if not union.isdisjoint(role)} - found
            found |= wider
            reached += wider
        return tuple(sorted(found, key=sorted))

    def role(self, model: str, kind: str) -> Role | None:
        """The ranks that may run a stage of this model and kind; None for every rank."""
        if (model, kind) not in self._known:
            limits = [ranks for (of, at), ranks in self.limits if of in ("", model) and at in ("", kind)]
            self._known[model, kind] = frozenset.intersection(*limits) if limits else None
        return self._known[model, kind]

    def allows(self, model: str, kind: str, ranks: Iterable[int]) -> bool:
        """Whether a stage of this model and kind may run on all of `ranks`."""
        role = self.role(model, kind)
        return role is None or role.issuperset(ranks)

    def among(self, model: str, kind: str, ranks: Collection[int]) -> tuple[int, ...]:
        """Those of `ranks` that may run a stage of this model and kind, in their order."""
        role = self.role(model, kind)
        return tuple(ranks) if role is None else tuple(rank for rank in ranks if rank in role)

    @cached_property
    def _known(self) -> dict[tuple[str, str], Role | None]:
        return {}


def _stage(limit: tuple[tuple[str, str], Role]) -> tuple[str, str]:
    return limit[0]


@dataclass(frozen=True)
class Nodes:
    """Which ranks share a machine of the pool: node `n` has the ranks from `n * ranks_per_node` to the next node's.

    ranks_per_node: the same for all nodes; None where one node has every rank.
    """

    ranks_per_node: int | None = None

    def of(self, rank: int) -> int:
        """The node of a rank.

        >>> Nodes(2).of(3)
        1
        """
        return 0 if self.ranks_per_node is None else rank // self.ranks_per_node

    def share(self, ranks: Iterable[int]) -> bool:
        """Whether all `ranks` are on one node."""
        return len({self.of(rank) for rank in ranks}) <= 1

    def by_node(self, ranks: Iterable[int]) -> dict[int, tuple[int, ...]]:
        """`ranks` in their order, by the node that they are on."""
        found: dict[int, list[int]] = {}
        for rank in ranks:
            found.setdefault(self.of(rank), []).append(rank)
        return {node: tuple(those) for node, those in found.items()}

    @property
    def are_several(self) -> bool:
        """Whether there may be more than one."""
        return self.ranks_per_node is not None

    def most(self, ranks: Collection[int]) -> int:
        """How many of `ranks` are on the node with most of them."""
        if self.ranks_per_node is None:
            return len(ranks)
        return max(Counter(rank // self.ranks_per_node for rank in ranks).values(), default=0)


ONE_NODE = Nodes()
"""Every rank is on the same node."""

ANYWHERE = StageRanks()
"""Every rank runs every stage."""


def aligned_groups(num_ranks: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """Disjoint blocks of `degree` neighbouring ranks; neighbours share the fastest links.

    >>> aligned_groups(4, 2)
    ((0, 1), (2, 3))
    """
    return tuple(tuple(range(start, start + degree)) for start in range(0, num_ranks - degree + 1, degree))
