"""Rows of a size that was not measured: OpenAI's largest, for models that were measured up to 1024x1024."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from tetriserve.core.request import Shape
from tetriserve.profile.table import Profile, Row

LARGEST = Shape(height=1024, width=1792)
"""Of the sizes that clients of OpenAI's API ask for."""
_ENOUGH_PIXELS = 1024 * 1024
"""A model that was measured up to here can be taken 1.75 times further."""
_EXPONENTS = 1.0, 2.0
"""Of times over sizes: from what is linear to what goes with the square, as attention does."""


def with_largest(profile: Profile, size_multiple: int) -> Profile:
    """`profile` with estimated rows of `LARGEST`; as it is if that is covered, too far away, or no size of the model.

    Times grow with a power of the size, that of the two largest sizes measured at the same degree. They are corrected
    by what is observed, as all others. That of a model of videos stays as it is.
    """
    measured = profile.shapes[-1]
    is_reached = measured.frames == 1 and _ENOUGH_PIXELS <= measured.num_pixels < LARGEST.num_pixels
    if not is_reached or LARGEST.height % size_multiple or LARGEST.width % size_multiple:
        return profile
    rows = sorted(
        (row for row in profile.rows if row.shape and row.batch == 1), key=lambda row: (row.stage, row.degree)
    )
    estimated = [_estimate([*of_one], measured) for _, of_one in groupby(rows, key=lambda row: (row.stage, row.degree))]
    return replace(profile, rows=(*profile.rows, *(row for row in estimated if row is not None)))


def _estimate(rows: Sequence[Row], measured: Shape) -> Row | None:
    """`rows` are of one stage and degree. None if they do not reach the largest size measured."""
    by_pixels = sorted(rows, key=lambda row: _pixels(row))
    last = by_pixels[-1]
    if _pixels(last) != measured.num_pixels:
        return None
    factor = LARGEST.num_pixels / _pixels(last)
    exponent = _EXPONENTS[0]
    smaller = [row for row in by_pixels if _pixels(row) < _pixels(last)]
    if smaller:
        slope = math.log(last.seconds / smaller[-1].seconds) / math.log(_pixels(last) / _pixels(smaller[-1]))
        exponent = min(max(slope, exponent), _EXPONENTS[1])
    return replace(
        last,
        height=LARGEST.height,
        width=LARGEST.width,
        tokens=None if last.tokens is None else round(last.tokens * factor),
        seconds=last.seconds * factor**exponent,
        cv=None,
    )


def _pixels(row: Row) -> int:
    assert row.shape is not None
    return row.shape.num_pixels
