"""Pictures that come along: how many, of which size the image is then, which steps are not made, what that takes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_intake import CARD, PROFILE, take
from tetriserve.core.errors import InvalidRequest
from tetriserve.core.request import Shape, Stage
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, ENCODE_IMAGE
from tetriserve.engine import Intake
from tetriserve.engine.picture_rules import PictureRules
from tetriserve.engine.pictures import InputPicture
from tetriserve.models.card import ModelCard
from tetriserve.profile import Profile, ProfileCost, Row

STARTING = dataclasses.replace(CARD, max_images=1, default_strength=0.6)
SEEING = dataclasses.replace(CARD, family="flux_kontext", max_images=1, size_multiple=16, pixels_per_token=16)


def profile_of(*shapes: Shape, multiple: int = 32) -> Profile:
    return dataclasses.replace(
        PROFILE,
        rows=(
            Row(stage=ENCODE, seconds=0.5),
            *(
                Row(
                    stage=DENOISE, height=shape.height, width=shape.width, tokens=shape.num_pixels // multiple**2,
                    seconds=shape.num_pixels / 1e6,
                )
                for shape in shapes
            ),
            *(
                Row(stage=stage, height=shape.height, width=shape.width, seconds=factor * shape.num_pixels / 1e6)
                for stage, factor in ((ENCODE_IMAGE, 2.0), (DECODE, 3.0))
                for shape in shapes
            ),
        ),
    )  # fmt: skip


WITH_PICTURES = profile_of(Shape(256, 256), Shape(512, 512))


def intake(card: ModelCard = STARTING, profile: Profile = WITH_PICTURES) -> Intake:
    return Intake(card=card, cost=ProfileCost(profile))


def picture(height: int, width: int) -> InputPicture:
    return InputPicture.of(np.zeros((height, width, 3), np.uint8))


def refusal(param: str, intake: Intake, **options: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        take(intake, **options)
    assert caught.value.param == param
    return str(caught.value)


def test_an_image_that_starts_from_a_picture_skips_steps_and_encodes_it_after_the_prompt() -> None:
    request = take(intake(), images=(picture(300, 200),), size="512x512")
    assert request.images == (Shape(300, 200),)
    assert request.stages == (Stage(ENCODE), Stage(ENCODE_IMAGE), Stage(DENOISE, 12), Stage(DECODE))
    assert (request.num_steps, request.skipped_steps, request.num_schedule_steps) == (12, 8, 20)
    assert request.deadline_s - 1000.0 == pytest.approx(3 * (0.5 + (2 + 12 + 3) * 512 * 512 / 1e6))


def test_an_image_whose_steps_see_a_picture_takes_as_long_as_both_together() -> None:
    profile = profile_of(Shape(256, 256), Shape(2048, 2048), multiple=16)
    request = take(intake(SEEING, profile), images=(picture(500, 500),), size="512x512", num_steps=10)
    encoded, step = request.stage_of(ENCODE_IMAGE), request.stage_of(DENOISE)
    assert (encoded.shape, request.skipped_steps, step.num_steps) == (Shape(1024, 1024), 0, 10)
    assert step.shape is not None
    assert step.shape.num_pixels == 1024 * 1024 + 512 * 512
    cost = ProfileCost(profile)
    assert cost.times(request, encoded)[1] == pytest.approx(2 * 1024 * 1024 / 1e6)
    assert cost.times(request, step)[1] == pytest.approx((1024 * 1024 + 512 * 512) / 1e6)
    alone = take(intake(SEEING, profile), size="512x512", num_steps=10)
    assert cost.times(alone, alone.stepped)[1] == pytest.approx(512 * 512 / 1e6)
    assert request.kind != alone.kind, "they share no task"


def test_what_was_observed_of_steps_with_a_picture_corrects_those_of_that_size_alone() -> None:
    from tetriserve.core.plan import Task

    profile = profile_of(Shape(256, 256), Shape(2048, 2048), multiple=16)
    request = take(intake(SEEING, profile), images=(picture(500, 500),), size="512x512", num_steps=10)
    cost = ProfileCost(profile)
    before = cost.times(request, request.stepped)[1]
    for _ in range(100):
        cost = cost.observed(Task((request.request_id,), DENOISE, (0,), 1), request, 2 * before)
    assert cost.times(request, request.stepped)[1] == pytest.approx(2 * before, rel=0.01)


@pytest.mark.parametrize(
    ("facts", "number", "message"),
    [
        ({"max_images": 0}, 1, "image: tiny takes no pictures"),
        ({}, 2, "image: 2 pictures came with the prompt; tiny takes 0 to 1"),
        ({"min_images": 1}, 0, "image: 0 pictures came with the prompt; tiny takes 1"),
        ({"min_images": 1, "max_images": 3}, 4, "image: 4 pictures came with the prompt; tiny takes 1 to 3"),
    ],
)
def test_another_number_of_pictures_is_refused(facts: dict[str, Any], number: int, message: str) -> None:
    card = dataclasses.replace(STARTING, **facts)
    assert refusal("image", intake(card), images=(picture(64, 64),) * number) == message


def test_a_picture_smaller_than_a_latent_is_refused() -> None:
    message = refusal("image", intake(), images=(picture(31, 500),))
    assert message == "image is 500x31; allowed: at least 32 pixels a side"


def test_a_profile_without_times_of_pictures_serves_prompts_alone_and_says_how_to_measure_it() -> None:
    old = intake(profile=PROFILE)
    assert old.pictures.max_images == 0
    assert take(old).images == ()
    message = refusal("image", old, images=(picture(64, 64),))
    assert message.startswith("image: the profile of tiny has no times for encoding pictures; measure it again: ")


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, math.inf, math.nan])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    message = refusal("strength", intake(), images=(picture(64, 64),), strength=strength)
    assert message == f"strength is {strength:g}; allowed: above 0, at most 1"


def test_a_strength_that_has_no_meaning_is_refused() -> None:
    assert refusal("strength", intake(), strength=0.5) == "strength is 0.5, but no picture came along"
    profile = profile_of(Shape(256, 256), Shape(2048, 2048), multiple=16)
    options = {"images": (picture(64, 64),), "strength": 0.5}
    seeing = refusal("strength", intake(SEEING, profile), **options)
    assert seeing == "strength is 0.5, but tiny does not start from a picture"


@given(strength=st.floats(0, 1, exclude_min=True), num_steps=st.integers(1, 200))
def test_the_steps_left_are_those_of_the_strength_and_one_at_least(strength: float, num_steps: int) -> None:
    skipped = PictureRules(STARTING, ProfileCost(WITH_PICTURES)).skipped_steps(strength, num_steps, 1)
    made = num_steps - skipped
    assert 1 <= made <= num_steps
    assert made - 1 < num_steps * strength + 1e-9
    assert made >= num_steps * strength - 1e-9


def test_pictures_that_make_steps_larger_than_was_measured_are_refused() -> None:
    profile = profile_of(Shape(256, 256), Shape(1024, 1024), multiple=16)
    message = refusal("size", intake(SEEING, profile), images=(picture(64, 64),), size="256x256")
    assert message == (
        "size: size 256x256 and the pictures that came along make 1114112 pixels of a step; measured: 65536 to 1048576"
    )


sides = st.integers(1, 64).map(lambda number: 16 * number)
shapes = st.builds(Shape, sides, sides)


@settings(max_examples=300)
@given(
    measured=st.lists(shapes, min_size=1, max_size=3, unique_by=lambda shape: shape.num_pixels),
    image=st.builds(Shape, st.integers(16, 20_000), st.integers(16, 20_000)),
    max_side=st.sampled_from([1024, 1536, 999_999]),
)
def test_the_size_taken_from_a_picture_is_legal_and_none_is_nearer(
    measured: list[Shape], image: Shape, max_side: int
) -> None:
    card = dataclasses.replace(STARTING, size_multiple=16, pixels_per_token=16, max_side=max_side)
    rules = intake(card, profile_of(*measured, multiple=16))
    size = rules.pictures.size_like([image])
    assert rules._shape(str(size)) == size

    low, high = (rules.shapes[index].num_pixels for index in (0, -1))
    scale = math.sqrt(min(max(image.num_pixels, low), high) / image.num_pixels)

    def distance(height: int, width: int) -> float:
        return math.hypot(math.log(height / image.height / scale), math.log(width / image.width / scale))

    multiples = range(16, rules.pictures.longest_side + 1, 16)
    legal = [(height, width) for height in multiples for width in multiples if low <= height * width <= high]
    nearest = min(distance(*each) for each in legal)
    assert distance(size.height, size.width) == pytest.approx(nearest)


def test_a_picture_of_a_size_that_is_served_keeps_it() -> None:
    for height, width in ((256, 256), (512, 512), (128, 512), (1024, 256), (320, 352)):
        assert take(intake(), images=(picture(height, width),)).shape == Shape(height, width)
        assert take(intake(), images=(picture(height, width),), size="auto").shape == Shape(height, width)
    assert take(intake(), images=(picture(64, 64),), size="512x256").shape == Shape(256, 512)
    assert take(intake(), images=(picture(4000, 6000),)).shape == Shape(416, 608)


def test_beside_a_picture_that_steps_see_the_size_leaves_room_for_it() -> None:
    profile = profile_of(Shape(256, 256), Shape(1024, 1280), multiple=16)
    request = take(intake(SEEING, profile), images=(picture(2000, 2000),))
    assert request.shape == Shape(512, 512)
    assert request.stepped.shape is not None
    assert request.stepped.shape.num_pixels <= 1024 * 1280
