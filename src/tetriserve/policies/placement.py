"""Which ranks a task gets, once its degree is chosen."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from tetriserve.core.trajectory import Trajectory


def place(
    wanted: Sequence[tuple[Trajectory, int]], idle: Iterable[int], *, preserve: bool = True
) -> list[tuple[int, ...]]:
    """Disjoint sets of idle ranks for `wanted`, pairs of a trajectory and its degree; answers in the same order.

    Wide sets are chosen first, so that narrow ones do not break up the blocks they need. Placement preservation
    (TetriServe, section 4.2.3): a request keeps exactly the ranks that hold its state when the degree stays, takes some
    of them when it narrows and ranks around them when it widens, so that little or nothing moves. Every set is
    ascending: process groups are keyed by it, and one set must not appear twice.

    Args:
        idle: free ranks, at least as many as the degrees sum to.
        preserve: False ignores where states are held (ablation).
    """
    free = set(idle)
    keeping = {
        index: tuple(sorted(trajectory.holders))
        for index, (trajectory, degree) in enumerate(wanted)
        if preserve and len(trajectory.holders) == degree and free.issuperset(trajectory.holders)
    }
    placed: dict[int, tuple[int, ...]] = {}
    for index in sorted(range(len(wanted)), key=lambda index: (-wanted[index][1], index not in keeping)):
        trajectory, degree = wanted[index]
        kept = keeping.pop(index, None)
        if kept is None or not free.issuperset(kept):
            others = {rank for ranks in keeping.values() for rank in ranks}
            kept = choose_ranks(degree, free, trajectory.holders if preserve else (), others)
        placed[index] = kept
        free.difference_update(kept)
    return [placed[index] for index in range(len(wanted))]


def choose_ranks(
    degree: int, free: Collection[int], holders: Sequence[int], others: Collection[int] = ()
) -> tuple[int, ...]:
    """`degree` ranks out of `free`, ascending.

    Aligned blocks first: they are the warm groups (TetriServe, section 5), and neighbours share the fastest links. Of
    several, the one with most of `holders`, then with fewest of `others`, which other requests would like to keep, then
    the one that splits the least free space. Narrowing to part of the holders needs no block; nor do scattered ranks
    when no block is free.
    """
    if degree == 1 and len(free) == 1:
        return tuple(free)
    held = [rank for rank in holders if rank in free]
    starts = sorted({rank - rank % degree for rank in free})
    blocks = [start for start in starts if all(rank in free for rank in range(start, start + degree))]
    if len(held) >= degree:
        blocks = [start for start in blocks if all(rank in held for rank in range(start, start + degree))]
        if not blocks:
            return tuple(sorted(held[:degree]))
    if len(blocks) == 1:
        return tuple(range(blocks[0], blocks[0] + degree))
    if blocks:

        def misfit(start: int) -> tuple[int, int, tuple[int, ...], int]:
            block = range(start, start + degree)
            num_held = sum(rank in block for rank in held)
            num_taken = sum(rank in block for rank in others)
            return -num_held, num_taken, _free_around(start, degree, free), start

        start = min(blocks, key=misfit)
        return tuple(range(start, start + degree))
    rest = sorted((rank for rank in free if rank not in held), key=lambda rank: (_free_around(rank, 1, free), rank))
    return tuple(sorted((held + rest)[:degree]))


def _free_around(start: int, degree: int, free: Collection[int]) -> tuple[int, ...]:
    """Free ranks in the enclosing aligned blocks of two, four and eight times the size: fewer is a better fit."""
    sizes = (2 * degree, 4 * degree, 8 * degree)
    return tuple(sum(rank - rank % size == start - start % size for rank in free) for size in sizes)
