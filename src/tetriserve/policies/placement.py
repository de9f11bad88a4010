"""Which ranks a task gets, once its degree is chosen."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tetriserve.core.trajectory import Trajectory


def place(
    wanted: Sequence[tuple[Trajectory, int]], idle: Sequence[int], *, preserve: bool = True
) -> list[tuple[int, ...]]:
    """Disjoint sets of idle ranks for `wanted`, pairs of a trajectory and its degree; answers in the same order.

    Placement preservation (TetriServe, section 4.2.3): a request stays on the ranks that hold its state, so that
    nothing moves. In order: requests that keep exactly their set; then, wide ones first, a subset of the holders when
    narrowing, an aligned block around them when widening, the aligned block that splits the least free space, and at
    last any idle ranks. Every set is ascending: process groups are keyed by it, and one set must not appear twice.

    Args:
        idle: free ranks, ascending; at least as many as the degrees sum to.
        preserve: False ignores where states are held (ablation).
    """
    free = set(idle)
    placed: dict[int, tuple[int, ...]] = {}
    if preserve:
        for index, (trajectory, degree) in enumerate(wanted):
            if len(trajectory.holders) == degree and free.issuperset(trajectory.holders):
                placed[index] = tuple(sorted(trajectory.holders))
                free.difference_update(placed[index])
    rest = [index for index in range(len(wanted)) if index not in placed]
    for index in sorted(rest, key=lambda index: -wanted[index][1]):
        trajectory, degree = wanted[index]
        placed[index] = choose_ranks(degree, free, trajectory.holders if preserve else ())
        free.difference_update(placed[index])
    return [placed[index] for index in range(len(wanted))]


def choose_ranks(degree: int, free: Collection[int], holders: Sequence[int]) -> tuple[int, ...]:
    """`degree` ranks out of `free`, ascending: near `holders` where possible, else splitting the least free space."""
    held = [rank for rank in holders if rank in free]
    # Aligned blocks are the warm groups (TetriServe, section 5), and neighbours share the fastest links.
    candidates = (range(start, start + degree) for start in sorted({rank - rank % degree for rank in free}))
    blocks = [block for block in candidates if all(rank in free for rank in block)]
    if len(held) >= degree:
        blocks = [block for block in blocks if all(rank in held for rank in block)]
        if not blocks:
            return tuple(sorted(held[:degree]))
    if blocks:
        return tuple(min(blocks, key=lambda block: (-_overlap(block, held), _free_around(block, free), block.start)))
    others = sorted((rank for rank in free if rank not in held), key=lambda rank: (_free_beside(rank, free), rank))
    return tuple(sorted((held + others)[:degree]))


def _overlap(block: range, held: Sequence[int]) -> int:
    return sum(rank in block for rank in held)


def _free_around(block: range, free: Collection[int]) -> tuple[int, ...]:
    """Free ranks in the enclosing aligned blocks of two, four and eight times the size: fewer is a better fit."""
    size = len(block)
    counts = []
    for factor in (2, 4, 8):
        start = block.start - block.start % (size * factor)
        counts.append(sum(rank in free for rank in range(start, start + size * factor)))
    return tuple(counts)


def _free_beside(rank: int, free: Collection[int]) -> tuple[int, ...]:
    return _free_around(range(rank, rank + 1), free)
