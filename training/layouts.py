"""Where the objects of training pictures lie: told by the noise that a picture is to be made from.

Flow matching leaves open which noise belongs to which picture. Drawn apart, noise says nothing of where objects lie,
and a small model that cannot decide draws one twice. Here a few numbers that any noise holds, its marks, say it: what
is left to learn is where, not whether. (Couplings that straighten the flow: Pooladian et al. 2023; this one is made to
be seen.) A place follows from few marks, and nearly the same marks mean nearly the same place, so that one who hears
them faintly is not far off.

Suffixes of names: B batch, S image tokens, C latent channels, M marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import NormalDist

import torch

from tetriserve.evaluation.drawing import MARGIN, Place
from tetriserve.evaluation.scenes import Relation, Scene
from tetriserve.evaluation.vocabulary import SIZES

PIXELS_PER_TOKEN = 32
_NUM_CELLS = {"small": 2, "": 3, "big": 4}
"""How many cells the square is wide that an item of each size fills, of 8 along the image's shorter side."""
_MAX_ITEMS = 3
NUM_MARKS = 3 * _MAX_ITEMS
"""Of each item: how far to the right, how far down, and how large within its stated size."""
_PATTERN = (0.5, -0.5, -0.5, 0.5)
"""Over the four latent pixels of a token. Pictures, which are smooth, hold little of it, so the noise is heard."""
_RANKS = {"left of": -1, "above": -1, "right of": 1, "below": 1}
_AXES = {"left of": 0, "right of": 0, "above": 1, "below": 1}


def draw_marks(random: Random) -> tuple[float, ...]:
    """NUM_MARKS independent standard normal numbers."""
    return tuple(random.gauss() for _ in range(NUM_MARKS))


def lay_out(scene: Scene, marks: tuple[float, ...], height: int, width: int) -> tuple[Place, ...]:
    """Where each item lies in an image of this shape: in a square of whole tokens, apart, and as the relations say.

    Two items share the image along their relation's axis, and have half each of what room they leave; those that
    nothing is said of lie side by side, the first named at the left. Relations are such as `draw_scene` makes.
    """
    side = min(height, width)
    # However relations are worded, the same item comes first: the upper one, the left one. Otherwise, the first named.
    order = sorted(range(len(scene.items)), key=lambda index: _rank(scene, index))
    shares = [NormalDist().cdf(mark) for mark in marks]
    squares = [
        _Square(
            side=_NUM_CELLS[item.size] * side // (8 * PIXELS_PER_TOKEN),
            shares=shares[3 * order.index(index) : 3 * order.index(index) + 3],
            limits=[(0, width // PIXELS_PER_TOKEN), (0, height // PIXELS_PER_TOKEN)],
        )
        for index, item in enumerate(scene.items)
    ]
    leaning = _arrange(squares, order, scene.relations) if len(order) > 1 else []
    for square in squares:
        square.put()
    for square, other, axis in leaning:
        square.stay_beside(other, axis)
    places = []
    for item, square in zip(scene.items, squares, strict=True):
        x, y = ((start + square.side / 2) * PIXELS_PER_TOKEN / side for start in square.start)
        least, most = SIZES[item.size]
        most = min(most, _NUM_CELLS[item.size] / 16 - MARGIN)
        places.append(Place(x=x, y=y, extent=least + (most - least) * square.shares[2]))
    return tuple(places)


@dataclass(kw_only=True)
class _Square:
    """What an item fills: `side` tokens from those that it starts at. By axis, 0 across and 1 down.

    shares: the quantiles of its marks: of the ways that it can lie, which.
    limits: between which lines of the grid it stays.
    """

    side: int
    shares: Sequence[float]
    limits: list[tuple[int, int]]
    start: list[int] = field(default_factory=lambda: [0, 0])

    def put(self) -> None:
        """Where its marks say, each place being as likely."""
        for axis, (first, last) in enumerate(self.limits):
            count = last - first - self.side + 1
            self.start[axis] = first + min(int(self.shares[axis] * count), count - 1)

    def stay_beside(self, other: _Square, axis: int) -> None:
        """Move so that the way from the one's centre to the other's is the longer along `axis`."""
        along = abs(self._twice_centre(axis) - other._twice_centre(axis))
        across = other._twice_centre(1 - axis) - self.side
        first, last = self.limits[1 - axis]
        self.limits[1 - axis] = (
            max(first, (across - along) // 2 + 1),
            min(last, self.side - (-across - along) // 2 - 1),
        )
        self.put()

    def _twice_centre(self, axis: int) -> int:
        return 2 * self.start[axis] + self.side


_Leaning = list[tuple[_Square, _Square, int]]


def _arrange(squares: list[_Square], order: list[int], relations: tuple[Relation, ...]) -> _Leaning:
    """Limit squares to parts of the image in which they keep apart; says which is to stay beside which on what axis."""
    relation, *others = relations or (Relation(subject=order[0], name="left of", target=order[1]),)
    axis = _AXES[relation.name]
    before, after = (squares[index] for index in order if index in (relation.subject, relation.target))
    third = [square for square in squares if square not in (before, after)]
    if not others:
        _halve(axis, [before], [after])
        if third:
            _halve(1 - axis, [before, after], third)
        return [(after, before, axis)]
    # The first item has a relation to each of the others.
    corner, second = squares[relation.subject], squares[relation.target]
    other_axis = _AXES[others[0].name]
    if other_axis != axis:
        _halve(axis, *_in_order(relation, [corner, *third], [second]))
        _halve(other_axis, *_in_order(others[0], [corner, second], third))
        return [(second, corner, axis), (third[0], corner, other_axis)]
    upper, lower = (squares[index] for index in order if squares[index] is not corner)
    _halve(axis, *_in_order(relation, [corner], [upper, lower]))
    # Not so far from each other that it cannot lie beside both.
    first, last = corner.limits[1 - axis]
    spare = max(0, last - first - (upper.side + lower.side + corner.side - 2))
    upper.limits[1 - axis] = lower.limits[1 - axis] = (first + spare // 2, last - (spare - spare // 2))
    _halve(1 - axis, [upper], [lower])
    return [(corner, upper, axis), (corner, lower, axis)]


def _in_order(
    relation: Relation, subjects: list[_Square], targets: list[_Square]
) -> tuple[list[_Square], list[_Square]]:
    return (subjects, targets) if _RANKS[relation.name] < 0 else (targets, subjects)


def _halve(axis: int, before: list[_Square], after: list[_Square]) -> None:
    """Cut what all these are limited to in two, with half of the room to spare on either side."""
    first, last = before[0].limits[axis]
    widest_before, widest_after = (max(square.side for square in part) for part in (before, after))
    cut = first + widest_before + (last - first - widest_before - widest_after) // 2
    for square in before:
        square.limits[axis] = (first, cut)
    for square in after:
        square.limits[axis] = (cut, last)


def _rank(scene: Scene, index: int) -> int:
    return sum(
        _RANKS[relation.name] * ((relation.subject == index) - (relation.target == index))
        for relation in scene.relations
    )


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
    return torch.unflatten(noise_BSC[..., : 4 * NUM_MARKS], -1, (NUM_MARKS, 4)) @ noise_BSC.new_tensor(_PATTERN)
