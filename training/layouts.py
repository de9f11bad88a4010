"""Where the objects of training pictures lie: on a grid, and told by the noise that a picture is to be made from.

Flow matching leaves open which noise belongs to which picture. Drawn apart, noise says nothing of where objects lie,
and a small model that cannot decide draws one twice. Here a few numbers that any noise holds, its marks, say it: what
is left to learn is where, not whether. (Couplings that straighten the flow: Pooladian et al. 2023; this one is made to
be seen.)

Suffixes of names: N layouts, K items, 2 left and top, B batch, S image tokens, C latent channels, M marks.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil
from random import Random
from statistics import NormalDist

import numpy as np
import torch

from tetriserve.evaluation.drawing import MARGIN, Place
from tetriserve.evaluation.scenes import Scene
from tetriserve.evaluation.vocabulary import COLOURS, SHAPES, SIZES

GRID = 8
"""Cells along the shorter side of the image. One is a token at 256x256."""
_MAX_ITEMS = 3
NUM_MARKS = 3 * _MAX_ITEMS
"""Of each item: how far to the right, how far down, and which of the two sizes within its stated one."""
_PATTERN = (0.5, -0.5, -0.5, 0.5)
"""Over the four latent pixels of a token. Pictures, which are smooth, hold little of it, so the noise is heard."""
_RANKS = {"left of": -1, "above": -1, "right of": 1, "below": 1}
_Relations = tuple[tuple[int, str, int], ...]


def draw_marks(random: Random) -> tuple[float, ...]:
    """NUM_MARKS independent standard normal numbers."""
    return tuple(random.gauss() for _ in range(NUM_MARKS))


def lay_out(scene: Scene, marks: tuple[float, ...], height: int, width: int) -> tuple[Place, ...]:
    """Where each item lies in an image of this shape: in a square of whole cells, at one of two sizes.

    Of all layouts that keep items apart and relations true each is as likely as any other. They are put in order by
    one coordinate after the other, each of which is at the quantile that its mark says (Knothe 1957), so that near
    marks mean near places.
    """
    # However a scene is worded, the same item comes first: the upper one, the left one.
    order = sorted(range(len(scene.items)), key=lambda index: _rank(scene, index))
    cells = tuple(_num_cells(scene.items[index].size) for index in order)
    relations = tuple(
        (order.index(relation.subject), relation.name, order.index(relation.target)) for relation in scene.relations
    )
    side = min(height, width)
    layouts_NK2 = _all_layouts(cells, relations, height * GRID // side, width * GRID // side)
    places: dict[int, Place] = {}
    for number, index in enumerate(order):
        across, down, size = (NormalDist().cdf(mark) for mark in marks[3 * number : 3 * number + 3])
        layouts_NK2, left = _narrowed(layouts_NK2, number, 0, across)
        layouts_NK2, top = _narrowed(layouts_NK2, number, 1, down)
        reach = cells[number] / (2 * GRID)
        least, most = SIZES[scene.items[index].size]
        places[index] = Place(
            x=left / GRID + reach, y=top / GRID + reach, extent=least if size < 0.5 else min(most, reach - MARGIN)
        )
    return tuple(places[index] for index in range(len(order)))


def marked(noise_BSC: torch.Tensor, marks_BM: torch.Tensor) -> torch.Tensor:
    """Standard normal noise with these marks instead of its own; for normal marks it is normal all the same.

    A mark is what one direction of unit length has of the noise: over all tokens the mean of `marks_in`, times the root
    of their number.
    """
    num_tokens = noise_BSC.shape[1]
    change_BM = marks_BM / num_tokens**0.5 - marks_in(noise_BSC).mean(1)
    pattern_M4 = noise_BSC.new_tensor(_PATTERN).expand(NUM_MARKS, 4)
    changed_BSC = noise_BSC.clone()
    changed_BSC[..., : 4 * NUM_MARKS] += (change_BM[..., None] * pattern_M4).flatten(1)[:, None]
    return changed_BSC


def marks_in(noise_BSC: torch.Tensor) -> torch.Tensor:
    """What each token has of each mark (B, S, M): the pattern, in one of the first latent channels."""
    return noise_BSC[..., : 4 * NUM_MARKS].unflatten(-1, (NUM_MARKS, 4)) @ noise_BSC.new_tensor(_PATTERN)


def _rank(scene: Scene, index: int) -> tuple[int, int, int]:
    item = scene.items[index]
    rank = sum(
        _RANKS[relation.name] * ((relation.subject == index) - (relation.target == index))
        for relation in scene.relations
    )
    return rank, tuple(COLOURS).index(item.colour), SHAPES.index(item.shape)


def _num_cells(size: str) -> int:
    return ceil(2 * (SIZES[size][0] + MARGIN) * GRID)


def _narrowed(layouts_NK2: np.ndarray, item: int, axis: int, quantile: float) -> tuple[np.ndarray, int]:
    """Those layouts that have this coordinate of this item at `quantile`, and the coordinate."""
    values_N = layouts_NK2[:, item, axis]
    counts = np.bincount(values_N)
    value = int(np.searchsorted(counts.cumsum(), quantile * len(values_N), side="right").clip(max=len(counts) - 1))
    return layouts_NK2[values_N == value], value


@lru_cache(maxsize=512)
def _all_layouts(cells: tuple[int, ...], relations: _Relations, height: int, width: int) -> np.ndarray:
    """Left and top cells of all items in every layout that fits into a grid of height x width cells, (N, K, 2)."""
    layouts_NK2 = np.zeros((1, 0, 2), dtype=np.int8)
    for item, size in enumerate(cells):
        spots_N2 = np.indices((width - size + 1, height - size + 1), dtype=np.int8).reshape(2, -1).T
        before_NK2 = layouts_NK2.repeat(len(spots_N2), axis=0)
        layouts_NK2 = np.concatenate([before_NK2, np.tile(spots_N2, (len(layouts_NK2), 1))[:, None]], axis=1)
        # In half cells, of which centres are whole numbers.
        centres_NK2 = 2 * layouts_NK2 + np.array(cells[: item + 1], dtype=np.int8)[:, None]
        fits_N = np.ones(len(layouts_NK2), dtype=bool)
        for other in range(item):
            distance_N = np.abs(centres_NK2[:, item] - centres_NK2[:, other]).max(axis=1)
            fits_N &= distance_N >= size + cells[other]
        for subject, name, target in relations:
            if item == max(subject, target):
                fits_N &= _holds(name, centres_NK2[:, subject] - centres_NK2[:, target])
        layouts_NK2 = layouts_NK2[fits_N]
    return layouts_NK2


def _holds(name: str, way_N2: np.ndarray) -> np.ndarray:
    """Whether the way from target to subject leads more in the relation's direction than across it."""
    axis = 0 if name in ("left of", "right of") else 1
    return _RANKS[name] * way_N2[:, axis] > np.abs(way_N2[:, 1 - axis])
