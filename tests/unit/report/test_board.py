"""Blocks where the tasks were, in the colour of their request, hatched where it was late."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tetriserve.report.board import board_sheet, busiest_window, draw_board
from tetriserve.workload.outcome import Outcome


@pytest.fixture
def outcomes(outcome_of: Callable[..., Outcome]) -> list[Outcome]:
    return [
        outcome_of("late", 1.0, 20.0, (2.0, 4.0, (0, 1)), (4.0, 20.0, (0,))),
        outcome_of("split", 0.0, 3.0, (0.0, 1.0, (0, 3)), (50.0, 60.0, (2,))),
    ]


def blocks(outcomes: list[Outcome], window: tuple[float, float]) -> list[Rectangle]:
    axes = Figure().add_subplot()
    draw_board(axes, outcomes, 4, window)
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def test_a_block_covers_adjacent_ranks_for_the_time_of_its_task(outcomes: list[Outcome]) -> None:
    drawn = blocks(outcomes, (0.0, 30.0))
    where = [(b.get_x(), b.get_width(), round(b.get_y()), round(b.get_height() + 0.08)) for b in drawn]
    assert where == [
        (0.0, 1.0, 0, 1), (0.0, 1.0, 3, 1),  # ranks 0 and 3 do not touch: two blocks
        (2.0, 2.0, 0, 2),
        (4.0, 16.0, 0, 1),
    ]  # fmt: skip


def test_a_request_has_one_colour_and_only_late_ones_are_hatched(outcomes: list[Outcome]) -> None:
    drawn = blocks(outcomes, (0.0, 30.0))
    colours = [block.get_facecolor() for block in drawn]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert [bool(block.get_hatch()) for block in drawn] == [False, False, True, True]


def test_the_sheet_has_the_tasks_of_the_window(outcomes: list[Outcome]) -> None:
    sheet = board_sheet({"fcfs": outcomes}, (0.0, 30.0))
    rows = [dict(zip((column.heading for column in sheet.columns), row, strict=True)) for row in sheet.rows]
    assert [(row["request"], row["ranks"], row["attained"]) for row in rows] == [
        ("split", "0 3", "yes"),
        ("late", "0 1", "no"),
        ("late", "0", "no"),
    ]
    assert (rows[1]["start s"], rows[1]["end s"], rows[1]["deadline s"]) == (2.0, 4.0, 11.0)


def test_the_window_is_where_most_requests_arrive(outcome_of: Callable[..., Outcome]) -> None:
    arrivals = [0.0, 100.0, 110.0, 120.0, 300.0]
    requests = [outcome_of(str(number), at, at).request for number, at in enumerate(arrivals)]
    assert busiest_window(requests) == (100.0, 130.0)
