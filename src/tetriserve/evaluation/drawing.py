"""Scenes drawn exactly: positions and sizes by chance within what the scene says, edges antialiased."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from tetriserve.evaluation.scenes import Relation, Scene
from tetriserve.evaluation.vocabulary import COLOURS, OUTLINES, SIZES

MARGIN = 0.03
"""Least distance of an object to the edges and to the others, over the shorter side of the image."""
_SUPERSAMPLING = 4


@dataclass(frozen=True, kw_only=True)
class Place:
    """Centre of an object's bounding box and half its longer side, in units of the image's shorter side."""

    x: float
    y: float
    extent: float


def place_items(scene: Scene, random: Random, height: int, width: int) -> tuple[Place, ...]:
    """Where each item lies in an image of this shape: apart from each other, as the scene's relations say."""
    side = min(height, width)
    while (places := _try_to_place(scene, random, height / side, width / side)) is None:
        pass
    return places


def draw_image(scene: Scene, places: Sequence[Place], height: int, width: int) -> np.ndarray:
    """Pixels (height, width, 3), uint8."""
    image = Image.new("RGB", (width, height), COLOURS[scene.background])
    side = min(height, width)
    for item, place in zip(scene.items, places, strict=True):
        left, top = int((place.x - place.extent) * side) - 1, int((place.y - place.extent) * side) - 1
        mask = _mask(item.shape, place.x * side - left, place.y * side - top, place.extent * side)
        image.paste(COLOURS[item.colour], (left, top), mask)
    return np.asarray(image)


def _mask(shape: str, x: float, y: float, extent: float) -> Image.Image:
    """Coverage of the pixels around a shape whose centre is (x, y) pixels from the mask's corner."""
    side = int(2 * extent) + 4
    mask = Image.new("L", (side * _SUPERSAMPLING,) * 2)
    for outline, fill in zip(OUTLINES[shape], (255, 0), strict=False):
        # Pillow names a pixel by its centre, hence the half.
        points = [
            ((x + extent * u) * _SUPERSAMPLING - 0.5, (y + extent * v) * _SUPERSAMPLING - 0.5) for u, v in outline
        ]
        ImageDraw.Draw(mask).polygon(points, fill=fill)
    return mask.reduce(_SUPERSAMPLING)


def _try_to_place(scene: Scene, random: Random, height: float, width: float) -> tuple[Place, ...] | None:
    """One throw, given up as soon as an object meets an earlier one or breaks a relation to it."""
    places: list[Place] = []
    for index, item in enumerate(scene.items):
        place = _draw_place(random, item.size, width, height)
        if not all(_are_apart(place, other) for other in places):
            return None
        places.append(place)
        if not all(_holds(relation, places) for relation in scene.relations if relation.target == index):
            return None
    return tuple(places)


def _draw_place(random: Random, size: str, width: float, height: float) -> Place:
    extent = random.uniform(*SIZES[size])
    reach = extent + MARGIN
    return Place(x=random.uniform(reach, width - reach), y=random.uniform(reach, height - reach), extent=extent)


def _are_apart(a: Place, b: Place) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= a.extent + b.extent + MARGIN


def _holds(relation: Relation, places: Sequence[Place]) -> bool:
    """Whether the relation is what one would say of the two: its direction is the longer part of the way."""
    subject, target = places[relation.subject], places[relation.target]
    right, down = subject.x - target.x, subject.y - target.y
    along, across = {
        "left of": (-right, down),
        "right of": (right, down),
        "above": (-down, right),
        "below": (down, right),
    }[relation.name]
    return along > abs(across)
