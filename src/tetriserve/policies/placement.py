"""Which ranks a task gets, once its degree is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from heapq import nsmallest
from itertools import chain, islice
from types import MappingProxyType
from typing import NamedTuple

from tetriserve.core.cluster import Nodes
from tetriserve.core.request import Lora
from tetriserve.core.stages import ADAPTED
from tetriserve.core.trajectory import Trajectory

_Wanted = Sequence[tuple[Sequence[int], int]]
"""For each request, the ranks that hold its state, and the degree that it gets."""
_Foreign = Callable[[int, int], int]
"""Of a request, by its index, and a rank: 1 if that has another adapter active than the request wants, else 0."""
NO_LORAS: Mapping[int, Lora] = MappingProxyType({})


def place(
    wanted: Sequence[tuple[Trajectory, int]],
    idle: Iterable[int],
    *,
    team_s: float,
    preserve: bool = True,
    spared: Set[int] = frozenset(),
    loras: Mapping[int, Lora] = NO_LORAS,
) -> list[tuple[int, ...]]:
    """Disjoint sets of idle ranks for `wanted`, pairs of a trajectory and its degree; answers in the same order.

    Placement preservation (TetriServe, section 4.2.3): a request keeps the ranks that hold its state when the degree
    stays, takes some of them when it narrows and others with them when it widens, so that little or nothing moves.
    Of ranks that are as good, those come first that have the request's adapter active already.
    Every set is ascending: process groups are keyed by it, and one set must not appear twice.

    Args:
        idle: free ranks, at least as many as the degrees sum to.
        team_s: what a set costs that has not worked together before (`CostModel.team_s`). Unless it is 0, few sets
            are used: aligned blocks go before ranks that hold a state, except where a request keeps its set.
        preserve: False ignores where states are held (ablation).
        spared: ranks that other stages depend on: used where no others will do or, if a new set of ranks costs time,
            by a request that keeps its set.
        loras: `State.loras`.
    """
    if not wanted:
        return []
    sets = [(trajectory.holders if preserve else (), degree) for trajectory, degree in wanted]
    foreign: _Foreign | None = None
    if loras or any(trajectory.request.lora is not None for trajectory, _ in wanted):
        foreign = lambda index, rank: num_foreign(wanted[index][0], (rank,), loras)  # noqa: E731
    if team_s:
        if spared:
            sets = [(() if _is_drawn_to(spared, *wish) else wish[0], wish[1]) for wish in sets]
        return _place_in_blocks(sets, idle, spared, foreign)
    if spared:
        others = frozenset(idle) - spared
        if len(others) >= sum(degree for _, degree in wanted):
            idle = others
    return _place_anywhere(sets, idle, spared, foreign)


def place_in_nodes(
    wanted: Sequence[tuple[Trajectory, int]],
    idle: Iterable[int],
    nodes: Nodes,
    *,
    team_s: float,
    preserve: bool = True,
    loras: Mapping[int, Lora] = NO_LORAS,
) -> list[tuple[int, ...]]:
    """`place` with every set on one node, as far as nodes have room: the others get what is left, wherever it is
    (`policies.nodes.within_nodes` makes them narrower, or puts them off).

    Wide sets choose first, and of equal ones those that stay as they are: the node that holds the state, else the one
    with the fewest idle ranks that are enough.
    """
    by_node = nodes.by_node(sorted(idle))
    num_free = {node: len(ranks) for node, ranks in by_node.items()}
    chosen: dict[int, list[int]] = {}
    scattered: list[int] = []

    def claim(index: int) -> tuple[int, bool]:
        trajectory, degree = wanted[index]
        return -degree, len(trajectory.holders) != degree

    for index in sorted(range(len(wanted)), key=claim):
        trajectory, degree = wanted[index]
        home = nodes.of(trajectory.holders[0]) if preserve and trajectory.holders else None
        node = best_node(degree, home, num_free)
        if node is None:
            scattered.append(index)
        else:
            num_free[node] -= degree
            chosen.setdefault(node, []).append(index)
    found: dict[int, tuple[int, ...]] = {}
    left = set(chain.from_iterable(by_node.values()))
    for indices, ranks in (*((chosen[node], by_node[node]) for node in chosen), (scattered, left)):
        sets = place([wanted[index] for index in indices], ranks, team_s=team_s, preserve=preserve, loras=loras)
        found.update(zip(indices, sets, strict=True))
        left.difference_update(*sets)
    return [found[index] for index in range(len(wanted))]


def best_node(degree: int, home: int | None, num_free: Mapping[int, int]) -> int | None:
    """`home` if it has room for `degree` ranks, else the node with the least room that is enough; None if none has."""
    if home is not None and num_free.get(home, 0) >= degree:
        return home
    fitting = [(free, node) for node, free in num_free.items() if free >= degree]
    return min(fitting)[1] if fitting else None


def num_foreign(trajectory: Trajectory, ranks: Iterable[int], loras: Mapping[int, Lora]) -> int:
    """How many of `ranks` would switch adapters for the trajectory's next task."""
    if trajectory.stage.kind not in ADAPTED:
        return 0
    lora = trajectory.request.lora
    return sum(loras.get(rank) != lora for rank in ranks)


def _is_drawn_to(spared: Set[int], holders: Sequence[int], degree: int) -> bool:
    """Whether a request would come to ranks to be spared for no more than a state that they hold."""
    return spared >= set(holders) and not len(holders) == degree > 1


def _place_anywhere(
    wanted: _Wanted, idle: Iterable[int], spared: Set[int], foreign: _Foreign | None
) -> list[tuple[int, ...]]:
    """As many ranks as possible stay with a request whose state they hold, which is a bipartite matching.

    Where not all can, requests whose set may stay the same go first, then those that narrow, then by their order. The
    other ranks are those that fewest requests have their states on, of these the lowest, or those with its adapter.
    """
    num_holding = _tally(rank for holders, _ in wanted for rank in holders)
    free = sorted(idle, key=lambda rank: (rank in spared, num_holding.get(rank, 0), rank))
    order = {rank: number for number, rank in enumerate(free)}
    held = [sorted(order.keys() & holders, key=order.__getitem__) for holders, _ in wanted]
    if foreign is not None:
        for index, ranks in enumerate(held):
            ranks.sort(key=lambda rank: (rank in spared, foreign(index, rank)))  # noqa: B023  used at once

    def claim(index: int) -> tuple[bool, bool]:
        holders, degree = wanted[index]
        return len(held[index]) < degree, len(holders) != degree

    keeper: dict[int, int] = {}  # index of the request that keeps a rank, by rank
    for index in sorted(range(len(wanted)), key=claim):
        for _ in range(wanted[index][1]):
            if not _keep_one_more(index, held, keeper):
                break
    kept: list[list[int]] = [[] for _ in wanted]
    for rank, index in keeper.items():
        kept[index].append(rank)
    others = [rank for rank in free if rank not in keeper]
    if foreign is not None:
        missing = [degree - len(ranks) for ranks, (_, degree) in zip(kept, wanted, strict=True)]
        burden = {rank: (rank in spared, num_holding.get(rank, 0)) for rank in others}
        shares = _by_adapter(missing, others, burden, foreign)
        return [tuple(sorted([*ranks, *more])) for ranks, more in zip(kept, shares, strict=True)]
    rest = iter(others)
    return [
        tuple(sorted([*ranks, *islice(rest, degree - len(ranks))]))
        for ranks, (_, degree) in zip(kept, wanted, strict=True)
    ]


def _by_adapter(
    missing: Sequence[int], others: Sequence[int], burden: Mapping[int, tuple[bool, int]], foreign: _Foreign
) -> list[list[int]]:
    """So many of `others` for each request, in their order. Of ranks of one `burden`, which is what speaks against a
    rank whatever its adapter, those with the request's adapter come first, and of the others those last that have the
    adapter of a request which is still to choose."""
    left = list(others)
    shares = []
    for index, count in enumerate(missing):
        waiting = [other for other in range(index + 1, len(missing)) if missing[other]]

        def rating(
            rank: int, index: int = index, waiting: Sequence[int] = waiting
        ) -> tuple[tuple[bool, int], int, int]:
            num_fitting = sum(not foreign(other, rank) for other in waiting)
            return burden[rank], foreign(index, rank), num_fitting

        chosen = sorted(left, key=rating)[:count] if count else []
        left = [rank for rank in left if rank not in chosen]
        shares.append(chosen)
    return shares


def _keep_one_more(index: int, held: Sequence[Sequence[int]], keeper: dict[int, int]) -> bool:
    """Let request `index` keep one more of the ranks that it `held`, if need be by having others keep other ranks than
    they do, but as many (an augmenting path); False if that is not possible."""
    reached: dict[int, tuple[int, int]] = {}  # rank that a request would give up, and the request that would get it
    queue = [index]
    for taker in queue:
        for rank in held[taker]:
            owner = keeper.get(rank)
            if owner is None:
                while taker != index:
                    keeper[rank] = taker
                    rank, taker = reached[taker]
                keeper[rank] = index
                return True
            if owner != index and owner not in reached:
                reached[owner] = rank, taker
                queue.append(owner)
    return False


def _place_in_blocks(
    wanted: _Wanted, idle: Iterable[int], spared: Set[int], foreign: _Foreign | None
) -> list[tuple[int, ...]]:
    """Wide sets are chosen first, so that narrow ones do not break up the blocks they need."""
    free = FreeRanks(idle)
    free.reserve(spared)
    keeping = {
        index: tuple(sorted(holders))
        for index, (holders, degree) in enumerate(wanted)
        if len(holders) == degree and free.has(holders)
    }
    for ranks in keeping.values():
        free.reserve(ranks)
    placed: dict[int, tuple[int, ...]] = {}
    for index in sorted(range(len(wanted)), key=lambda index: (-wanted[index][1], index not in keeping)):
        holders, degree = wanted[index]
        kept = keeping.get(index)
        if kept is not None:
            free.give_up(kept)
        if kept is not None and free.has(kept):
            free.remove(kept)
            placed[index] = kept
        else:
            placed[index] = free.take(degree, holders, None if foreign is None else partial(foreign, index))
    return [placed[index] for index in range(len(wanted))]


class _Fit(NamedTuple):
    """How well the free block at `start` would serve, best first.

    num_kept: its ranks that requests would like to keep.
    around: free ranks in the enclosing aligned blocks of two, four and eight times the size: fewer is a better fit.
    """

    num_kept: int
    around: tuple[int, ...]
    start: int


class FreeRanks:
    """Free ranks, handed out one set at a time, in aligned blocks where there are any.

    Taking sets one after the other costs time in proportion to the free blocks of that size, not to the pool: the fits
    of one size are worked out once, and renewed only around what is taken.
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        self._free = set(ranks)
        self._num_keepers: dict[int, int] = {}  # by rank
        self._num_free: dict[int, dict[int, int]] = {}  # by size, then by number of the aligned block
        self._fits: dict[int, _Fit] = {}  # by start, of all free blocks of `_degree` ranks
        self._degree = 0

    def has(self, ranks: Iterable[int]) -> bool:
        return self._free.issuperset(ranks)

    def reserve(self, ranks: Iterable[int]) -> None:
        """A request would like to keep `ranks`; others get them only when nothing else is left."""
        for rank in ranks:
            self._num_keepers[rank] = self._num_keepers.get(rank, 0) + 1
        self._renew(ranks)

    def give_up(self, ranks: Iterable[int]) -> None:
        """Undo `reserve`."""
        for rank in ranks:
            self._num_keepers[rank] -= 1
        self._renew(ranks)

    def remove(self, ranks: Sequence[int]) -> None:
        """`ranks` are not free any more."""
        self._free.difference_update(ranks)
        for size, counts in self._num_free.items():
            for rank in ranks:
                counts[rank // size] -= 1
        self._renew(ranks)

    def take(
        self, degree: int, holders: Sequence[int] = (), foreign: Callable[[int], int] | None = None
    ) -> tuple[int, ...]:
        """Choose `degree` ranks, ascending, and remove them.

        Aligned blocks first: they are the warm groups (TetriServe, section 5), and neighbours share the fastest links.
        Of several, the one with most of `holders`, then with fewest that other requests would like to keep, then the
        one that splits the least free space, then with fewest ranks that are `foreign`. Narrowing to part of the
        holders needs no block; nor do scattered ranks when no block is free.
        """
        ranks = self._choose(degree, [rank for rank in holders if rank in self._free], foreign)
        self.remove(ranks)
        return ranks

    def _choose(self, degree: int, held: Sequence[int], foreign: Callable[[int], int] | None) -> tuple[int, ...]:
        if len(self._free) == degree:
            return tuple(sorted(self._free))
        num_held = _tally(rank - rank % degree for rank in held)
        if len(held) >= degree:
            within = [self._fit(start, degree) for start, number in num_held.items() if number == degree]
            return _block(min(within), degree) if within else tuple(sorted(held[:degree]))
        around = [
            (-number, self._fit(start, degree))
            for start, number in num_held.items()
            if self._count(start, degree) == degree
        ]
        if around:
            return _block(min(around)[1], degree)
        fits = self._fits_of(degree)
        if fits and foreign is not None:
            best = min(
                fits.values(),
                key=lambda fit: (fit.num_kept, fit.around, sum(map(foreign, _block(fit, degree))), fit.start),
            )
            return _block(best, degree)
        if fits:
            return _block(min(fits.values()), degree)
        others = nsmallest(degree - len(held), self._free.difference(held), key=lambda rank: self._fit(rank, 1)[1:])
        return tuple(sorted((*held, *others)))

    def _fits_of(self, degree: int) -> dict[int, _Fit]:
        if self._degree != degree:
            self._degree = degree
            starts = {rank - rank % degree for rank in self._free}
            self._fits = {s: self._fit(s, degree) for s in starts if self._count(s, degree) == degree}
        return self._fits

    def _renew(self, ranks: Iterable[int]) -> None:
        """Bring `_fits` up to date with what has changed at `ranks`."""
        fits, degree = self._fits, self._degree
        if not fits:
            return
        size = 8 * degree
        for first in {rank - rank % size for rank in ranks}:
            for start in range(first, first + size, degree):
                if start not in fits:
                    continue
                if self._count(start, degree) == degree:
                    fits[start] = self._fit(start, degree)
                else:
                    del fits[start]

    def _fit(self, start: int, degree: int) -> _Fit:
        keepers = self._num_keepers
        num_kept = sum(keepers.get(rank, 0) > 0 for rank in range(start, start + degree)) if keepers else 0
        return _Fit(num_kept, tuple(self._count(start, size) for size in (2 * degree, 4 * degree, 8 * degree)), start)

    def _count(self, start: int, size: int) -> int:
        """Free ranks in the aligned block of `size` that holds `start`."""
        counts = self._num_free.get(size)
        if counts is None:
            counts = self._num_free[size] = _tally(rank // size for rank in self._free)
        return counts.get(start // size, 0)


def _tally(items: Iterable[int]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts


def _block(fit: _Fit, degree: int) -> tuple[int, ...]:
    return tuple(range(fit.start, fit.start + degree))
