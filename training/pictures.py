"""Training pictures by number: the same seed is the same scene and drawing, at any size and on any machine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from itertools import product
from math import log
from multiprocessing import get_context
from random import Random
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tetriserve.evaluation.drawing import Place, draw_image, place_items
from tetriserve.evaluation.scenes import Scene, draw_training
from tetriserve.evaluation.vocabulary import COLOURS, SHAPES
from training.layouts import PIXELS_PER_TOKEN, draw_marks, lay_out

_NUM_ITEMS = {1: 0.35, 2: 0.45, 3: 0.20}
_CROPS = {64: 0.6, 128: 0.25, 256: 0.15}
_SIDES = (256, 256, 512)
_COLOURS = tuple(COLOURS)
_LEAST_COVERED = 0.05
"""Of a token, by the object that it is part of."""
_Result = TypeVar("_Result")


def scene_of(seed: int) -> Scene:
    return _drawn(seed)[0]


def marks_of(seed: int) -> tuple[float, ...]:
    """What the noise tells that becomes the picture of `scene_of(seed)`; see `lay_out`."""
    return _drawn(seed)[1]


class Label(NamedTuple):
    """What a token is part of: its object's colour and shape, numbered from 1, or 0 and 0 for nothing.

    across, down: from the object's centre to the token's, over half the object's longer side.
    extent: logarithm of half the object's longer side in tokens.
    """

    colour: int = 0
    shape: int = 0
    across: float = 0.0
    down: float = 0.0
    extent: float = 0.0


@cache
def labels_of(seed: int, height: int, width: int) -> np.ndarray:
    """For each token of `scene_of(seed)` drawn so, in rows, its `Label`: (S, 5), float32."""
    scene, places = _laid_out(seed, height, width)
    side = PIXELS_PER_TOKEN / min(height, width)
    labels = []
    for row, column in product(range(height // PIXELS_PER_TOKEN), range(width // PIXELS_PER_TOKEN)):
        label = Label()
        least_area = _LEAST_COVERED * side**2
        for item, place in zip(scene.items, places, strict=True):
            width_covered = _overlap(column * side, side, place.x, place.extent)
            area = width_covered * _overlap(row * side, side, place.y, place.extent)
            if area > least_area:
                least_area = area
                label = Label(
                    colour=1 + _COLOURS.index(item.colour),
                    shape=1 + SHAPES.index(item.shape),
                    across=((column + 0.5) * side - place.x) / place.extent,
                    down=((row + 0.5) * side - place.y) / place.extent,
                    extent=log(place.extent / side),
                )
        labels.append(label)
    return np.array(labels, dtype=np.float32)


@cache
def spots_of(seed: int, height: int, width: int) -> np.ndarray:
    """Of each item of `scene_of(seed)` drawn so: how far its centre is to the right and down, and its size, (K, 3)."""
    _, places = _laid_out(seed, height, width)
    side = min(height, width)
    spots = [(place.x * side / width, place.y * side / height, 4 * place.extent) for place in places]
    return 4 * np.array(spots, dtype=np.float32) - 2


def _overlap(start: float, length: float, centre: float, extent: float) -> float:
    """Of [start, start + length] with [centre - extent, centre + extent]."""
    return max(0.0, min(start + length, centre + extent) - max(start, centre - extent))


def pictures_of(seeds: Iterable[int], height: int, width: int) -> np.ndarray:
    """Pixels (len(seeds), height, width, 3), uint8, of each `scene_of(seed)`."""
    return np.stack([_picture_of(seed, height, width) for seed in seeds])


def crops_of(seed: int, num_pixels: int) -> np.ndarray:
    """Pixels (B, side, side, 3), uint8: squares at objects, of drawings of several sizes, `num_pixels` together."""
    random = Random(seed)
    (crop,) = random.choices(tuple(_CROPS), tuple(_CROPS.values()))
    return np.stack([_draw_crop(random, crop) for _ in range(max(1, num_pixels // crop**2))])


def prefetched(
    function: Callable[..., _Result], calls: Iterable[tuple[Any, ...]], num_workers: int
) -> Iterator[_Result]:
    """function(*call) for each of `calls`, in order, computed ahead by `num_workers` processes; 0 is in this one."""
    if not num_workers:
        yield from (function(*call) for call in calls)
        return
    # Forking a process that uses CUDA or threads is unsafe.
    with ProcessPoolExecutor(num_workers, get_context("spawn")) as pool:
        pending: deque[Future[_Result]] = deque()
        for call in calls:
            pending.append(pool.submit(function, *call))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def draw_scene_of_any_count(random: Random) -> Scene:
    (num_items,) = random.choices(tuple(_NUM_ITEMS), tuple(_NUM_ITEMS.values()))
    return draw_training(random, num_items)


def _picture_of(seed: int, height: int, width: int) -> np.ndarray:
    return draw_image(*_laid_out(seed, height, width), height, width)


def _laid_out(seed: int, height: int, width: int) -> tuple[Scene, tuple[Place, ...]]:
    scene, marks = _drawn(seed)
    return scene, lay_out(scene, marks, height, width)


def _drawn(seed: int) -> tuple[Scene, tuple[float, ...]]:
    random = Random(seed)
    return draw_scene_of_any_count(random), draw_marks(random)


def _draw_crop(random: Random, crop: int) -> np.ndarray:
    """A square around a point of an object's box; the whole image when `crop` is as large."""
    side = random.choice(_SIDES)
    scene = draw_scene_of_any_count(random)
    places = place_items(scene, random, side, side)
    place = random.choice(places)
    x, y = (centre + random.uniform(-1, 1) * place.extent for centre in (place.x, place.y))
    left, top = (max(0, min(side - crop, int(centre * side) - crop // 2)) for centre in (x, y))
    return draw_image(scene, places, side, side)[top : top + crop, left : left + crop]
