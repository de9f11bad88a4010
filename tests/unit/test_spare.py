"""What promises keep in hand follows the share of them that is kept."""

from __future__ import annotations

import random

import pytest

from tetriserve.control.spare import FIRST_SPARE, LEAST_SPARE, MOST_SPARE, Spare
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages


def promise(spare: Spare, name: str, deadline_s: float) -> None:
    spare.note_promise(
        Request(
            request_id=name,
            prompt="",
            shape=Shape(64, 64),
            stages=image_stages(1),
            seed=0,
            arrival_s=0.0,
            deadline_s=deadline_s,
        )
    )


def test_promises_that_are_kept_narrow_it_to_its_least() -> None:
    spare = Spare()
    promise(spare, "stays open", 1e9)
    for number in range(200):
        promise(spare, str(number), number + 1.0)
        spare.note_end(str(number), number + 0.9)
    assert spare.fraction == LEAST_SPARE


def test_it_settles_where_49_of_50_are_kept() -> None:
    """Finishes are late by up to 0.4 of the time until them, uniformly."""
    spare, dice, num_kept = Spare(), random.Random(0), 0
    promise(spare, "stays open", 1e9)
    for number in range(4000):
        lateness = dice.uniform(0, 0.4)
        deadline_s = number + 1.0 + spare.fraction
        promise(spare, str(number), deadline_s)
        spare.note_end(str(number), number + 1.0 + lateness)
        num_kept += lateness <= deadline_s - number - 1.0
    assert num_kept / 4000 == pytest.approx(0.98, abs=0.01)


def test_a_broken_promise_counts_once_and_as_soon_as_its_deadline_is_over() -> None:
    spare = Spare()
    promise(spare, "a", 1.0)
    promise(spare, "b", 9.0)
    spare.note_time(1.1)
    widened = spare.fraction
    assert widened == pytest.approx(FIRST_SPARE + 0.098)
    spare.note_end("a", 5.0)
    assert spare.fraction == widened


def test_it_has_bounds_and_fades_while_nothing_is_promised() -> None:
    spare = Spare()
    for number in range(50):
        promise(spare, str(number), 1.0)
    spare.note_time(2.0)
    assert spare.fraction == MOST_SPARE
    spare.note_time(4.0)
    assert spare.fraction == pytest.approx((FIRST_SPARE + MOST_SPARE) / 2)
    spare.note_time(30.0)
    assert spare.fraction == pytest.approx(FIRST_SPARE, abs=1e-3)


def test_images_that_were_promised_nothing_teach_nothing() -> None:
    spare = Spare()
    spare.note_end("unknown", 5.0)
    assert spare.fraction == FIRST_SPARE
