"""What ranks hold of the models, by role: ranks that hold the same are told of together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Component:
    """A part of a model that a rank holds, and the bytes of its parameters and buffers. model: the model's key."""

    name: str
    num_bytes: int
    model: str = ""

    def __str__(self) -> str:
        """
        >>> str(Component("vae", 2_500_000, "video"))
        'video/vae 2.5 MB'
        """
        return f"{self.model}{'/' if self.model else ''}{self.name} {shown_bytes(self.num_bytes)}"


@dataclass(frozen=True, slots=True)
class RankMemory:
    """What a rank holds of the models. `resident_bytes`: of its process, on the host, once it is warm; 0 if unknown."""

    components: tuple[Component, ...] = ()
    resident_bytes: int = 0


@dataclass(frozen=True, slots=True)
class HeldAlike:
    """Ranks that hold the same components. resident_bytes: of their processes, in the order of `ranks`."""

    ranks: tuple[int, ...]
    components: tuple[Component, ...]
    resident_bytes: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of all components, on each of the ranks."""
        return sum(component.num_bytes for component in self.components)

    def __str__(self) -> str:
        """
        >>> str(HeldAlike((0, 1), (Component("vae", 2_500_000),), (10**9, 10**9)))
        'ranks 0,1 hold 2.5 MB each: vae 2.5 MB'
        """
        parts = ", ".join(map(str, self.components))
        who = f"rank {self.ranks[0]} holds" if len(self.ranks) == 1 else f"ranks {','.join(map(str, self.ranks))} hold"
        return f"{who} {shown_bytes(self.num_bytes)}{' each' if len(self.ranks) > 1 else ''}: {parts}"


def held_alike(memory: Mapping[int, RankMemory]) -> tuple[HeldAlike, ...]:
    """The roles of the ranks, each with the ranks that have it, in the order of their first ranks."""
    by_role: dict[tuple[Component, ...], list[int]] = {}
    for rank, held in memory.items():
        by_role.setdefault(held.components, []).append(rank)
    return tuple(
        HeldAlike(tuple(ranks), components, tuple(memory[rank].resident_bytes for rank in ranks))
        for components, ranks in by_role.items()
    )


def held_of(memory: Mapping[int, RankMemory], model: str) -> dict[int, RankMemory]:
    """What ranks hold of the model with this key, those that hold some of it."""
    parts = {
        rank: replace(held, components=tuple(each for each in held.components if each.model == model))
        for rank, held in memory.items()
    }
    return {rank: held for rank, held in parts.items() if held.components}


def shown_bytes(num_bytes: int) -> str:
    """In units of a thousand, as data sheets of devices have them."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"
