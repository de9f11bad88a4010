"""Reads a picture back: which colours and shapes lie where. Classical image processing, no learnt part.

A picture is shrunk to `_SIDE` pixels, every pixel named after the nearest colour, and every connected region of one
colour that is thick enough taken for an object. Its shape is the one whose outline covers it best.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from tetriserve.evaluation.vocabulary import COLOURS, OUTLINES, SHAPES

UNKNOWN = "unknown"
_SIDE = 256
_TEMPLATE_SIDE = 48
_LEAST_OVERLAP = 0.7
"""Intersection over union below which a region is of no known shape."""
_SCALES = (1.0, 1.08, 1.16, 1.24)
_LEAST_THICKNESS = 7
"""Pixels (of `_SIDE`): thinner regions are edges, where two colours mix into a third."""
_LEAST_AREA = 0.004
"""Of the square of the shorter side."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One object: `shape` may be "unknown"; centre of its bounding box and half its longer side, as in `Place`."""

    colour: str
    shape: str
    x: float
    y: float
    extent: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    background: str
    objects: tuple[Found, ...]


def read_image(pixels: np.ndarray) -> Reading:
    """What the picture `pixels` (height, width, 3), uint8, shows."""
    names, labels = _name_colours(_shrunk(pixels))
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    background = names[np.bincount(edge, minlength=len(names)).argmax()]
    objects = [
        found
        for index, colour in enumerate(names)
        if colour != background
        for found in _find_objects(labels == index, colour)
    ]
    return Reading(background=background, objects=tuple(objects))


def _shrunk(pixels: np.ndarray) -> np.ndarray:
    """At `_SIDE` pixels on the shorter side, without its noise."""
    image = Image.fromarray(pixels)
    factor = _SIDE / min(image.size)
    width, height = (round(side * factor) for side in image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX).filter(ImageFilter.MedianFilter(3)))


def _name_colours(pixels: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """The colours' names and, for every pixel, the number of the nearest."""
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    # The nearest has the greatest p.c - |c|^2 / 2.
    closeness = pixels.astype(np.float32) @ palette.T - np.square(palette).sum(axis=-1) / 2
    return tuple(COLOURS), closeness.argmax(axis=-1)


def _find_objects(mask: np.ndarray, colour: str) -> list[Found]:
    least_area = _LEAST_AREA * _SIDE**2
    if mask.sum() < least_area:
        return []
    regions, num_regions = ndimage.label(mask)
    thick = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=_LEAST_THICKNESS // 2)
    found = []
    for number, box in enumerate(ndimage.find_objects(regions, num_regions), start=1):
        region = regions[box] == number
        if thick[box][region].any() and region.sum() >= least_area:
            rows, columns = box
            found.append(
                Found(
                    colour=colour,
                    shape=_name_shape(region),
                    x=(columns.start + columns.stop) / 2 / _SIDE,
                    y=(rows.start + rows.stop) / 2 / _SIDE,
                    extent=max(region.shape) / 2 / _SIDE,
                )
            )
    return found


def _name_shape(region: np.ndarray) -> str:
    """The shape that covers `region` best, centred and at the best of a few sizes: soft edges cost thin tips."""
    sizes = [_centred(region, scale) for scale in _SCALES]
    overlaps = {shape: max(_overlap(seen, template) for seen in sizes) for shape, template in _templates().items()}
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= _LEAST_OVERLAP else UNKNOWN


def _centred(region: np.ndarray, scale: float) -> np.ndarray:
    """`region` at its aspect ratio in a square `scale` times its longer side, resized to the templates' size."""
    height, width = region.shape
    side = round(scale * max(height, width))
    square = Image.new("L", (side, side))
    square.paste(Image.fromarray(region.astype(np.uint8) * 255), ((side - width) // 2, (side - height) // 2))
    return np.asarray(square.resize((_TEMPLATE_SIDE,) * 2, Image.Resampling.BOX)) / 255


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two coverages."""
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


@cache
def _templates() -> dict[str, np.ndarray]:
    """Coverage (_TEMPLATE_SIDE, _TEMPLATE_SIDE) of every shape, from 0 to 1."""
    scale = 4
    side = _TEMPLATE_SIDE * scale
    templates = {}
    for shape in SHAPES:
        image = Image.new("L", (side, side))
        for outline, fill in zip(OUTLINES[shape], (255, 0), strict=False):
            points = [((u + 1) / 2 * side - 0.5, (v + 1) / 2 * side - 0.5) for u, v in outline]
            ImageDraw.Draw(image).polygon(points, fill=fill)
        templates[shape] = np.asarray(image.reduce(scale)) / 255
    return templates
