"""Which process groups exist, decided in one place for all their members."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection


class GroupTable:
    """Names of live groups by their ranks, least recently used first.

    Live groups cost threads and file descriptors in every member, so at most `max_groups` are kept, or as many as are
    in use at once if those are more. A name is never used twice: a group formed again after it broke or was dropped
    meets under a name of its own.
    """

    def __init__(self, max_groups: int) -> None:
        self._max_groups = max_groups
        self._names: OrderedDict[tuple[int, ...], str] = OrderedDict()
        self._num_named = 0

    def name(self, ranks: tuple[int, ...]) -> str:
        """The group of `ranks`, named now if it does not exist."""
        if ranks not in self._names:
            self._num_named += 1
            self._names[ranks] = f"group-{self._num_named}-" + "-".join(map(str, ranks))
        self._names.move_to_end(ranks)
        return self._names[ranks]

    def surplus(self, in_use: Collection[tuple[int, ...]]) -> list[tuple[tuple[int, ...], str]]:
        """Take out what exceeds the cap: (ranks, name) of each group that its members shall drop.

        Groups `in_use` stay: some of their members may still be on the way to form them.
        """
        num_surplus = max(0, len(self._names) - self._max_groups)
        dropped = [ranks for ranks in self._names if ranks not in in_use][:num_surplus]
        return [(ranks, self._names.pop(ranks)) for ranks in dropped]

    def broken(self, rank: int) -> list[tuple[tuple[int, ...], str]]:
        """Take out every group that `rank` belongs to."""
        hit = [(ranks, name) for ranks, name in self._names.items() if rank in ranks]
        for ranks, _ in hit:
            del self._names[ranks]
        return hit

    def discard(self, ranks: tuple[int, ...]) -> str | None:
        """Take out the group of exactly `ranks`."""
        return self._names.pop(ranks, None)

    def discard_named(self, name: str) -> tuple[int, ...] | None:
        """Take out the group of this name; its ranks."""
        ranks = next((ranks for ranks, known in self._names.items() if known == name), None)
        if ranks is not None:
            del self._names[ranks]
        return ranks
