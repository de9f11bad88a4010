"""The words that the bundled model knows, and what each of them looks like.

Outlines are in units of half an object's longer side: every one fits [-1, 1] x [-1, 1], touches it on one axis and is
centred; y grows downwards, as in an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import cos, pi, sin

Point = tuple[float, float]
Outline = tuple[Point, ...]

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (222, 36, 36),
    "orange": (248, 142, 28),
    "yellow": (252, 222, 40),
    "green": (36, 156, 60),
    "cyan": (60, 204, 224),
    "blue": (36, 72, 216),
    "purple": (128, 44, 172),
    "pink": (252, 144, 196),
    "white": (250, 250, 250),
    "gray": (132, 132, 132),
    "black": (16, 16, 16),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring")
SIZES: Mapping[str, tuple[float, float]] = {"small": (0.09, 0.12), "": (0.13, 0.18), "big": (0.20, 0.24)}
"""Half of an object's longer side over the image's shorter side, from and to; "" when no size is stated."""
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE: Mapping[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "gray": ("gray", "grey"),
    "cyan": ("cyan", "turquoise"),
    "purple": ("purple", "violet"),
    "circle": ("circle", "disc"),
    "cross": ("cross", "plus"),
    "diamond": ("diamond", "rhombus"),
    "big": ("big", "large", "huge"),
    "small": ("small", "little", "tiny"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath", "underneath"),
}
"""What else a caption may call a word; a word that is not here has one name."""


def _circle(radius: float = 1.0, num_points: int = 96) -> Outline:
    angles = (2 * pi * index / num_points for index in range(num_points))
    return tuple((radius * cos(angle), radius * sin(angle)) for angle in angles)


def _star(inner: float = 0.45) -> Outline:
    radii = (1.0, inner) * 5
    return _fitted(tuple((r * sin(pi * k / 5), -r * cos(pi * k / 5)) for k, r in enumerate(radii)))


def _heart(num_points: int = 96) -> Outline:
    angles = [2 * pi * index / num_points for index in range(num_points)]
    return _fitted(
        tuple((16 * sin(a) ** 3, -(13 * cos(a) - 5 * cos(2 * a) - 2 * cos(3 * a) - cos(4 * a))) for a in angles)
    )


def _cross(arm: float = 0.34) -> Outline:
    quarter = ((arm, -1.0), (arm, -arm), (1.0, -arm), (1.0, arm))
    turned = tuple((-y, x) for x, y in quarter)
    half = quarter[:3] + turned[:3]
    return half + tuple((-x, -y) for x, y in half)


def _fitted(points: Outline) -> Outline:
    """Moved and scaled so that the bounding box is centred and its longer side is 2."""
    xs, ys = zip(*points, strict=True)
    x_mid, y_mid = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    half = max(max(xs) - min(xs), max(ys) - min(ys)) / 2
    return tuple(((x - x_mid) / half, (y - y_mid) / half) for x, y in points)


OUTLINES: Mapping[str, tuple[Outline, ...]] = {
    "circle": (_circle(),),
    "square": (((-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)),),
    "triangle": (_fitted(((0.0, -1.0), (0.866, 0.5), (-0.866, 0.5))),),
    "star": (_star(),),
    "heart": (_heart(),),
    "cross": (_cross(),),
    "diamond": (((0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)),),
    "ring": (_circle(), _circle(0.55)),
}
"""Each shape's outer outline and, if it has one, the outline of its hole."""
