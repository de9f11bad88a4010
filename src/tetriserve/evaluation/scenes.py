"""What a picture shows: one to three objects on a background, and how they lie to each other."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from random import Random

from tetriserve.evaluation.vocabulary import COLOURS, OPPOSITE, RELATIONS, SHAPES

HELD_OUT_FRACTION = 0.05
DEFAULT_BACKGROUND = "white"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One object. `size` is "small", "big", or "" when nothing is said of it."""

    colour: str
    shape: str
    size: str = ""


@dataclass(frozen=True, kw_only=True)
class Relation:
    """Item number `subject` is `name` ("left of", ...) item number `target`."""

    subject: int
    name: str
    target: int


@dataclass(frozen=True, kw_only=True)
class Scene:
    """No item has the background's colour, and no two items have both colour and shape in common."""

    background: str
    items: tuple[Item, ...]
    relations: tuple[Relation, ...] = ()

    @property
    def is_held_out(self) -> bool:
        """Whether the scene belongs to the part (`HELD_OUT_FRACTION`) that is never trained on."""
        return zlib.crc32(repr(self).encode()) < HELD_OUT_FRACTION * 2**32


def draw_scene(random: Random, num_items: int) -> Scene:
    """A random scene of `num_items` (1 to 3) objects. Two objects are related four times out of five."""
    background = DEFAULT_BACKGROUND if random.random() < 0.3 else random.choice(tuple(COLOURS))
    colours = [colour for colour in COLOURS if colour != background]
    items: list[Item] = []
    while len(items) < num_items:
        item = Item(
            colour=random.choice(colours), shape=random.choice(SHAPES), size=_draw_size(random, items, num_items)
        )
        if all((item.colour, item.shape) != (other.colour, other.shape) for other in items):
            items.append(item)
    return Scene(background=background, items=tuple(items), relations=_draw_relations(random, num_items))


def draw_held_out(random: Random, num_items: int) -> Scene:
    """A random scene that is never trained on."""
    while not (scene := draw_scene(random, num_items)).is_held_out:
        pass
    return scene


def draw_training(random: Random, num_items: int) -> Scene:
    """A random scene that may be trained on."""
    while (scene := draw_scene(random, num_items)).is_held_out:
        pass
    return scene


def _draw_size(random: Random, items: list[Item], num_items: int) -> str:
    """At most two big objects, and one among three: more do not always fit."""
    num_big = sum(item.size == "big" for item in items)
    return random.choice(("", "", "small", "big" if num_big + num_items < 4 else ""))


def _draw_relations(random: Random, num_items: int) -> tuple[Relation, ...]:
    """Of the first item to the second, sometimes to the third too; never three in a row, which may not fit."""
    if num_items == 1 or random.random() < 0.2:
        return ()
    name = random.choice(RELATIONS)
    first = Relation(subject=0, name=name, target=1)
    if num_items == 3 and random.random() < 0.5:
        names = [other for other in RELATIONS if other != OPPOSITE[name]]
        return (first, Relation(subject=0, name=random.choice(names), target=2))
    return (first,)
