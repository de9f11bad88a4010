"""Requests, shapes and trajectories: what is stored, and what is derived from it."""

from __future__ import annotations

import pytest

from tetriserve.core.cluster import aligned_groups
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, image_stages
from tetriserve.core.trajectory import Trajectory

REQUEST = Request(
    request_id="r", prompt="p", shape=Shape(256, 512), stages=image_stages(3), seed=0, arrival_s=1.0, deadline_s=2.0
)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ("512x256", Shape(height=256, width=512)),
        ("1x999999", Shape(height=999999, width=1)),
        ("0064x0128", Shape(height=128, width=64)),
    ],
)
def test_a_size_is_read_width_first(size: str, shape: Shape) -> None:
    assert Shape.parse(size) == shape


@pytest.mark.parametrize(
    "size", ["", "x", "512", "512x", "x512", "0x512", "512x0", "512X512", "-1x2", "1.5x2", " 1x2", "1x2 ", "1x2x3",
             "1x2\n", "1000000x1", "big", "auto"]
)  # fmt: skip
def test_anything_else_is_refused_with_the_value_and_an_example(size: str) -> None:
    with pytest.raises(ValueError, match="is not of the form WIDTHxHEIGHT, such as 512x512") as caught:
        Shape.parse(size)
    assert repr(size) in str(caught.value)


def test_a_shape_is_written_as_it_is_read_and_counts_its_pixels() -> None:
    assert str(Shape(256, 512)) == "512x256"
    assert Shape.parse(str(Shape(256, 512))) == Shape(256, 512)
    assert str(Shape(256, 512, frames=9)) == "512x256x9"
    assert Shape(256, 512).num_pixels == 131072
    assert Shape(256, 512, frames=9).num_pixels == 9 * 131072


def test_a_trajectory_goes_from_encode_over_its_steps_to_decode() -> None:
    trajectory = Trajectory(REQUEST)
    assert (trajectory.stage.kind, trajectory.is_short, trajectory.remaining_steps) == (ENCODE, True, 3)
    trajectory = trajectory.after(0, is_stage_over=True)
    assert (trajectory.stage.kind, trajectory.is_short, trajectory.remaining_steps) == (DENOISE, False, 3)
    trajectory = trajectory.after(2, is_stage_over=False)
    assert (trajectory.stage.kind, trajectory.remaining_steps) == (DENOISE, 1)
    assert trajectory == Trajectory.at(REQUEST, 1, 2)
    trajectory = trajectory.after(1, is_stage_over=True)
    assert (trajectory.stage.kind, trajectory.is_short, trajectory.remaining_steps) == (DECODE, True, 0)
    trajectory = trajectory.after(0, is_stage_over=True)
    assert (trajectory.is_over, trajectory.steps_done) == (True, 3)


def test_a_stage_may_be_over_before_all_its_steps_are_done() -> None:
    early = Trajectory.at(REQUEST, 1, 1).after(1, is_stage_over=True)
    assert (early.stage.kind, early.steps_done, early.remaining_steps) == (DECODE, 2, 0)


def test_aligned_groups_are_disjoint_blocks_of_neighbours() -> None:
    assert aligned_groups(4, 1) == ((0,), (1,), (2,), (3,))
    assert aligned_groups(5, 2) == ((0, 1), (2, 3))
