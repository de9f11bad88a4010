"""Whether a picture shows the scene that was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tetriserve.evaluation.reading import Found, Reading
from tetriserve.evaluation.scenes import Item, Relation, Scene
from tetriserve.evaluation.vocabulary import SIZES

_LEAST_DISTANCE = 0.03
"""How far apart two centres must lie to be left, right, above or below; of the shorter side of the image."""
_SIZE_BOUNDS = {
    "small": (0.0, (SIZES["small"][1] + SIZES[""][0]) / 2 + 0.01),
    "big": ((SIZES[""][1] + SIZES["big"][0]) / 2 - 0.01, 1.0),
    "": (0.0, 1.0),
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """What is right of one picture.

    objects: just those asked for are there, each with its colour and shape.
    relations, sizes: all of them, and the objects; None if the scene names none.
    """

    background: bool
    objects: bool
    relations: bool | None
    sizes: bool | None


def score_reading(scene: Scene, reading: Reading) -> Score:
    found = {(each.colour, each.shape): each for each in reading.objects}
    asked = Counter((item.colour, item.shape) for item in scene.items)
    is_complete = Counter((each.colour, each.shape) for each in reading.objects) == asked
    objects = [found[item.colour, item.shape] for item in scene.items] if is_complete else []
    has_sizes = any(item.size for item in scene.items)
    return Score(
        background=reading.background == scene.background,
        objects=is_complete,
        relations=is_complete and all(_holds(relation, objects) for relation in scene.relations)
        if scene.relations
        else None,
        sizes=is_complete and all(map(_has_size, scene.items, objects)) if has_sizes else None,
    )


def _holds(relation: Relation, objects: Sequence[Found]) -> bool:
    subject, target = objects[relation.subject], objects[relation.target]
    right, down = subject.x - target.x, subject.y - target.y
    along = {"left of": -right, "right of": right, "above": -down, "below": down}[relation.name]
    return along >= _LEAST_DISTANCE


def _has_size(item: Item, found: Found) -> bool:
    low, high = _SIZE_BOUNDS[item.size]
    return low <= found.extent <= high
