"""What may be asked of a video: frames that the model makes, sizes that were measured, and mistakes by their field."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetriserve.core.errors import InvalidRequest
from tetriserve.core.execution import Execution
from tetriserve.core.request import MP4, Request, Shape, VideoOptions
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, ENCODE_IMAGE
from tetriserve.engine.intake import Generation, Intake
from tetriserve.engine.pictures import InputPicture
from tetriserve.engine.video_rules import VideoRules, VideoWish
from tetriserve.models.card import ModelCard
from tetriserve.profile import Profile, ProfileCost, Row

CARD = ModelCard(
    name="tiny/wan", path=Path("tiny"), family="flux", pipeline_class="FluxPipeline",
    execution=Execution("float32"), size_multiple=16, pixels_per_token=16, num_heads=4, num_text_tokens=64,
    default_num_steps=20, default_guidance_scale=5.0, has_guidance=True, has_negative_prompt=True,
    sizes=(Shape(64, 96, 9), Shape(96, 96, 13), Shape(64, 64, 5)), fingerprint="abc", max_images=1,
    frame_step=4, max_frames=17, default_fps=8.0, has_boundary=True, has_flow_shift=True,
)  # fmt: skip
MEASURED = (Shape(64, 64, 5), Shape(96, 96, 17))
COST = ProfileCost(
    Profile(
        model="tiny/wan", hardware="h", execution=Execution("float32"), source="s", created="c", switch_s=0.001,
        frame_step=4,
        rows=(
            Row(stage=ENCODE, seconds=0.5),
            Row(stage=ENCODE_IMAGE, seconds=0.1),
            *(
                Row(
                    stage=stage, height=shape.height, width=shape.width, frames=shape.frames, seconds=shape.frames / 10,
                    tokens=shape.height * shape.width // 256 * (shape.frames // 4 + 1) if stage == DENOISE else None,
                )
                for stage in (DENOISE, DECODE)
                for shape in MEASURED
            ),
        ),
    )
)  # fmt: skip
INTAKE = Intake(card=CARD, cost=COST)
PICTURE_MODEL = dataclasses.replace(CARD, name="tiny/flux", frame_step=0, max_frames=1, sizes=(Shape(64, 64),))
PICTURE_COST = ProfileCost(
    dataclasses.replace(
        COST.profile,
        frame_step=1,
        rows=tuple(dataclasses.replace(row, frames=1, tokens=row.tokens and 16) for row in COST.profile.rows),
    )
)


def take(
    intake: Intake = INTAKE, *, size: str | None = None, images: tuple[InputPicture, ...] = (), **wish: Any
) -> Request:
    generation = Generation(prompt="a cat", size=size, images=images, video=VideoWish(**wish))
    return intake.request(generation, request_id="id", seed=7, now=0.0, cost=intake.cost)


def picture(height: int, width: int) -> InputPicture:
    return InputPicture(Shape(height, width), bytes(3 * height * width))


def test_a_prompt_alone_is_a_video_of_the_models_own_size_frames_and_speed() -> None:
    request = take()
    assert (request.shape, request.video, request.media_type) == (Shape(64, 96, 9), VideoOptions(8.0), MP4)


def test_a_size_of_the_models_own_has_its_own_number_of_frames_and_any_other_the_defaults() -> None:
    assert take(size="96x96").shape == Shape(96, 96, 13)
    assert take(size="auto").shape == Shape(64, 96, 9)
    assert take(size="96x64").shape == Shape(64, 96, 9)
    assert take(size="80x64").shape == Shape(64, 80, 9)
    assert take(size="64x64", num_frames=17).shape == Shape(64, 64, 17)


@pytest.mark.parametrize(
    ("asked", "made"), [(1, 1), (2, 1), (3, 5), (5, 5), (6, 5), (7, 9), (8, 9), (10, 9), (11, 13), (16, 17), (17, 17)]
)
def test_frames_are_rounded_to_the_nearest_number_that_the_model_makes_and_that_is_said(asked: int, made: int) -> None:
    rules = INTAKE.videos
    assert rules.num_frames(VideoWish(num_frames=asked), None) == made
    said = rules.rounding(VideoWish(num_frames=asked))
    if asked == made:
        assert said is None
    else:
        assert said == f"num_frames: {asked} was rounded to {made}: tiny/wan makes 1 + a multiple of 4"


@given(st.integers(1, 12), st.integers(1, 200), st.data())
def test_no_number_that_the_model_makes_is_nearer(step: int, most: int, data: st.DataObject) -> None:
    rules = VideoRules(dataclasses.replace(CARD, frame_step=step, max_frames=most), COST)
    asked = data.draw(st.integers(1, most))
    made = rules.num_frames(VideoWish(num_frames=asked), None)
    legal = range(1, most + 1, step)
    assert made in legal
    assert abs(made - asked) == min(abs(each - asked) for each in legal)


def test_seconds_stand_for_frames_at_the_speed_asked_for() -> None:
    assert take(seconds=2.0).shape.frames == 17
    assert take(seconds=1.0).shape.frames == 9
    assert take(seconds=0.5, fps=24.0).shape.frames == 13
    assert take(seconds=0.5, fps=24.0).video == VideoOptions(24.0)
    said = INTAKE.videos.rounding(VideoWish(seconds=2.0))
    assert said is not None
    assert said.startswith("seconds: 2 at 8 frames per second is 16 frames, which was rounded to 17")
    assert take(seconds=1.0, num_frames=9).shape.frames == 9


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"num_frames": 0}, "num_frames", "num_frames is 0; allowed: 1 to 17"),
    ({"num_frames": 18}, "num_frames", "num_frames is 18; allowed: 1 to 17"),
    ({"seconds": 0.0}, "seconds", "1 to 17 frames at 8 a second"),
    ({"seconds": -1.0}, "seconds", "seconds is -1"),
    ({"seconds": 2.2}, "seconds", "allowed: 0.125 to 2.12, which is 1 to 17 frames at 8 a second"),
    ({"seconds": math.nan}, "seconds", "seconds is nan"),
    ({"seconds": math.inf}, "seconds", "seconds is inf"),
    ({"seconds": 2.0, "num_frames": 9}, "seconds", "seconds is 2, which is 16 frames, and num_frames is 9; leave one"),
    ({"fps": 0.0}, "fps", "fps is 0; allowed: 1 to 120"),
    ({"fps": 121.0}, "fps", "fps is 121"),
    ({"fps": math.nan, "seconds": 1.0}, "fps", "fps is nan"),
    ({"guidance_scale_2": -1.0}, "guidance_scale_2", "allowed: 0 to 100"),
    ({"boundary_ratio": 1.5}, "boundary_ratio", "allowed: 0 to 1"),
    ({"flow_shift": 0.0}, "flow_shift", "allowed: 0.01 to 100"),
    ({"size": "64"}, "size", "not of the form WIDTHxHEIGHT"),
    ({"size": "65x64"}, "size", "multiples of 16"),
    ({"size": "112x96", "num_frames": 17}, "size", "112x96 with 17 frames is too large; allowed: from 64x64"),
    ({"size": "48x48"}, "size", "48x48 with 9 frames is too small"),
    ({"size": "64x64", "num_frames": 1}, "size", "64x64 with 1 frame is too small"),
    ({"num_frames": 1}, "num_frames", "num_frames: a video of 96x64 with 1 frame is too small"),
    ({"seconds": 0.125}, "seconds", "seconds: a video of 96x64 with 1 frame is too small"),
    ({"size": "208x16", "num_frames": 17}, "size", "no side may be longer than 192"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "param", "hint"), BAD)
def test_a_mistake_is_one_line_with_its_field(asked: dict[str, Any], param: str, hint: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        take(**asked)
    assert refused.value.param == param
    assert hint in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_has_no_meaning_for_the_model_is_refused() -> None:
    plain = Intake(card=dataclasses.replace(CARD, has_boundary=False, has_flow_shift=False), cost=COST)
    for param, why in (
        ("guidance_scale_2", "guidance_scale_2 is 1, but tiny/wan has no second transformer"),
        ("boundary_ratio", "boundary_ratio is 1, but tiny/wan has no second transformer"),
        ("flow_shift", "flow_shift is 1, but tiny/wan takes no shift of its noise levels"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            take(plain, **{param: 1.0})
        assert (refused.value.param, str(refused.value)) == (param, why)
        assert getattr(take(**{param: 1.0}).video, param) == 1.0


def test_a_video_is_not_asked_of_a_model_of_images_nor_an_image_of_one_of_videos() -> None:
    with pytest.raises(InvalidRequest, match="tiny/wan makes videos, and no images"):
        INTAKE.request(Generation(prompt="a cat"), request_id="id", seed=7, now=0.0, cost=COST)
    with pytest.raises(InvalidRequest, match="tiny/flux makes images, and no videos"):
        take(Intake(card=PICTURE_MODEL, cost=PICTURE_COST))


def test_a_picture_from_which_a_video_starts_gives_its_proportions() -> None:
    request = take(images=(picture(300, 600),), num_frames=9)
    assert request.shape == Shape(80, 176, 9)
    assert request.images == (Shape(300, 600),)
    assert [stage.kind for stage in request.stages] == [ENCODE, ENCODE_IMAGE, DENOISE, DECODE]
    assert take(images=(picture(300, 600),), size="64x64").shape == Shape(64, 64, 5)


@given(st.integers(16, 2000), st.integers(16, 2000), st.integers(1, 17))
def test_whatever_the_picture_its_video_was_measured(height: int, width: int, num_frames: int) -> None:
    try:
        shape = take(images=(picture(height, width),), num_frames=num_frames).shape
    except InvalidRequest as refused:  # of too few frames even the largest is too small
        assert INTAKE.videos.num_frames(VideoWish(num_frames=num_frames), None) == 1
        assert refused.param == "num_frames"
    else:
        low, high = (COST.profile.num_latent_pixels(each) for each in MEASURED)
        assert low <= COST.profile.num_latent_pixels(shape) <= high
