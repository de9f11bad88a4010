"""From a client's words to a request: defaults, and every mistake with its field and what is allowed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from tetriserve.core.errors import InvalidRequest
from tetriserve.core.execution import Execution
from tetriserve.core.plan import CostModel, Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, image_stages
from tetriserve.engine.intake import Generation, Intake
from tetriserve.models.card import ModelCard
from tetriserve.profile import Profile, ProfileCost, Row

CARD = ModelCard(
    name="tiny", path=Path("tiny"), family="flux", pipeline_class="FluxPipeline",
    execution=Execution("float32"), size_multiple=32,
    pixels_per_token=32, num_heads=8, num_text_tokens=64, default_num_steps=20, default_guidance_scale=3.5,
    has_guidance=True, has_negative_prompt=True, sizes=(Shape(512, 512), Shape(256, 256)), fingerprint="abc",
)  # fmt: skip
PROFILE = Profile(
    model="tiny",
    hardware="h",
    execution=Execution("float32"),
    source="s",
    created="c",
    switch_s=0.001,
    rows=(
        Row(stage=ENCODE, seconds=0.5),
        *(
            Row(stage=DENOISE, height=side, width=side, tokens=side * side // 1024, degree=degree, seconds=step_s)
            for side, degree, step_s in ((256, 1, 0.1), (256, 2, 0.06), (512, 1, 0.4), (512, 2, 0.22))
        ),
        Row(stage=DECODE, height=256, width=256, seconds=0.2),
        Row(stage=DECODE, height=512, width=512, seconds=0.8),
    ),
)
INTAKE = Intake(card=CARD, cost=ProfileCost(PROFILE), default_slo_scale=3.0, max_steps=100, max_prompt_chars=50)


def take(intake: Intake = INTAKE, **options: Any) -> Request:
    return take_at(intake.cost, intake, **options)


def take_at(cost: CostModel, intake: Intake = INTAKE, **options: Any) -> Request:
    generation = Generation(**{"prompt": "a cat", **options})
    return intake.request(generation, request_id="id", seed=77, now=1000.0, cost=cost)


def test_a_prompt_alone_gets_the_models_defaults() -> None:
    request = take()
    assert request == Request(
        request_id="id", prompt="a cat", shape=Shape(512, 512), stages=image_stages(20), seed=77, arrival_s=1000.0,
        deadline_s=request.deadline_s, guidance_scale=3.5, negative_prompt=None, true_cfg_scale=1.0, priority=0,
    )  # fmt: skip


def test_the_default_deadline_is_a_multiple_of_the_time_alone_at_degree_1() -> None:
    assert take().deadline_s == pytest.approx(1000.0 + 3.0 * (0.5 + 20 * 0.4 + 0.8))
    small = {"size": "256x256", "num_steps": 2, "negative_prompt": "blurry"}
    assert take(**small).deadline_s == pytest.approx(1000.0 + 3.0 * (2 * 0.5 + 2 * 2 * 0.1 + 0.2))
    twice = dataclasses.replace(INTAKE, default_slo_scale=1.5)
    assert take(twice, size="256x256", num_steps=1).deadline_s == pytest.approx(1000.0 + 1.5 * 0.8)


def test_the_default_deadline_follows_what_was_observed_of_encode_steps_and_decode_at_every_request() -> None:
    asked = take()
    encode, step, decode = (
        Task(("id",), stage, (0,), num_steps) for stage, num_steps in ((ENCODE, 0), (DENOISE, 1), (DECODE, 0))
    )
    cost = INTAKE.cost
    for _ in range(100):  # the profile was measured under load: all is four times as quick
        cost = cost.observed(encode, asked, 0.125).observed(step, asked, 0.1).observed(decode, asked, 0.2)
    assert take_at(cost).deadline_s == pytest.approx(1000.0 + 3.0 * (0.5 + 20 * 0.4 + 0.8) / 4)
    assert take_at(cost, slo_s=7.0).deadline_s == 1007.0


def test_a_default_deadline_is_never_one_that_a_client_could_not_have_asked_for() -> None:
    patient = dataclasses.replace(INTAKE, default_slo_scale=1e6)
    assert take(patient).deadline_s == pytest.approx(1000.0 + 24 * 3600)


def test_everything_a_client_says_is_taken() -> None:
    request = take(
        size="512x256", seed=2**63 - 1, num_steps=100, guidance_scale=0.0, negative_prompt="", true_cfg_scale=2.5,
        slo_s=0.25, priority=-3,
    )  # fmt: skip
    assert (request.shape, request.seed, request.num_steps) == (Shape(height=256, width=512), 2**63 - 1, 100)
    assert (request.guidance_scale, request.negative_prompt, request.true_cfg_scale) == (0.0, "", 2.5)
    assert (request.deadline_s, request.priority, request.stepped.num_passes) == (1000.25, -3, 2)


@pytest.mark.parametrize("prompt", ["", " \n\t", "\u3000"])
def test_an_empty_prompt_is_drawn_as_in_the_pipeline(prompt: str) -> None:
    assert take(prompt=prompt).prompt == prompt


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("negative_prompt", [None, "blurry"])
def test_a_true_cfg_scale_of_at_most_1_turns_it_off_as_in_the_pipeline(
    negative_prompt: str | None, scale: float
) -> None:
    assert take(negative_prompt=negative_prompt, true_cfg_scale=scale).stepped.num_passes == 1


def test_a_request_may_ask_for_fewer_text_tokens_that_all_its_degrees_divide() -> None:
    assert take().max_sequence_length is None
    assert take(max_sequence_length=34).max_sequence_length == 34
    alone = dataclasses.replace(INTAKE, cost=ProfileCost(PROFILE, lambda shape: (1,)))
    assert take(alone, max_sequence_length=33).max_sequence_length == 33


def test_auto_is_the_models_first_size() -> None:
    assert take(size="auto").shape == Shape(512, 512)


def test_a_negative_prompt_without_a_scale_takes_effect() -> None:
    request = take(negative_prompt="blurry")
    assert (request.true_cfg_scale, request.stepped.num_passes) == (4.0, 2)


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"prompt": "x" * 51}, "prompt", "prompt has 51 characters; allowed: at most 50"),
        ({"size": "big"}, "size", "size 'big' is not of the form WIDTHxHEIGHT, such as 512x512"),
        ({"size": "0x256"}, "size", "size '0x256' is not of the form WIDTHxHEIGHT, such as 512x512"),
        ({"size": "250x256"}, "size", "size '250x256': width and height must be multiples of 32"),
        ({"size": "256x300"}, "size", "size '256x300': width and height must be multiples of 32"),
        ({"size": "128x128"}, "size", "allowed: 65536 (256x256) to 262144 (512x512)"),
        ({"size": "544x512"}, "size", "allowed: 65536 (256x256) to 262144 (512x512)"),
        ({"size": "32x2080"}, "size", "size '32x2080': no side may be longer than 1024"),
        ({"num_steps": 0}, "num_steps", "num_steps is 0; allowed: 1 to 100"),
        ({"num_steps": 101}, "num_steps", "num_steps is 101; allowed: 1 to 100"),
        ({"seed": -1}, "seed", "seed is -1; allowed: 0 to 9223372036854775807"),
        ({"seed": 2**63}, "seed", "seed is 9223372036854775808; allowed: 0 to 9223372036854775807"),
        ({"guidance_scale": -0.5}, "guidance_scale", "guidance_scale is -0.5; allowed: 0.0 to 100.0"),
        ({"guidance_scale": math.nan}, "guidance_scale", "guidance_scale is nan; allowed: 0.0 to 100.0"),
        ({"true_cfg_scale": 3.0}, "true_cfg_scale", "true_cfg_scale above 1 needs a negative_prompt"),
        ({"negative_prompt": "n", "true_cfg_scale": -0.5}, "true_cfg_scale", "is -0.5; allowed: 0.0 to 100.0"),
        ({"true_cfg_scale": -0.5}, "true_cfg_scale", "true_cfg_scale above 1 needs a negative_prompt"),
        ({"max_sequence_length": 0}, "max_sequence_length", "max_sequence_length is 0; allowed: 1 to 64"),
        ({"max_sequence_length": 65}, "max_sequence_length", "max_sequence_length is 65; allowed: 1 to 64"),
        ({"negative_prompt": "n" * 51}, "negative_prompt", "negative_prompt has 51 characters; allowed: at most 50"),
        ({"negative_prompt": " " * 51}, "negative_prompt", "negative_prompt has 51 characters; allowed: at most 50"),
        ({"slo_s": 0.0}, "slo_s", "slo_s is 0; allowed: above 0, at most 86400"),
        ({"slo_s": -1.0}, "slo_s", "slo_s is -1; allowed: above 0"),
        ({"slo_s": math.inf}, "slo_s", "slo_s is inf; allowed: above 0"),
        ({"slo_s": math.nan}, "slo_s", "slo_s is nan; allowed: above 0"),
        (
            {"request_id": "../../etc/passwd"},
            "request_id",
            "request_id is '../../etc/passwd'; allowed: 1 to 128 of A-Z",
        ),
        ({"request_id": "a/b"}, "request_id", "allowed: 1 to 128 of A-Z, a-z, 0-9, - and _"),
        ({"request_id": "a.b"}, "request_id", "request_id is 'a.b'; allowed"),  # would be dropped together with "a"
        ({"request_id": "*"}, "request_id", "request_id is '*'; allowed"),
        ({"request_id": ""}, "request_id", "request_id is ''; allowed"),
        ({"request_id": "x" * 129}, "request_id", "allowed: 1 to 128 of A-Z"),
        ({"request_id": "a\n"}, "request_id", "request_id is 'a\\n'; allowed"),
        ({"request_id": "\u0663"}, "request_id", "allowed: 1 to 128 of A-Z"),
        ({"priority": 1_000_001}, "priority", "priority is 1000001; allowed: -1000000 to 1000000"),
    ],
)
def test_a_bad_value_is_refused_with_its_field_and_what_is_allowed(
    options: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        take(**options)
    assert caught.value.param == param
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("facts", "options", "message"),
    [
        ({"has_negative_prompt": False}, {"negative_prompt": "n"}, "tiny has no negative prompt"),
        ({"has_negative_prompt": False}, {"true_cfg_scale": 2.0}, "tiny takes guidance_scale, not true_cfg_scale"),
        (
            {"has_negative_prompt": False, "has_guidance": False},
            {"true_cfg_scale": 2.0},
            "tiny takes no scale of guidance, not true_cfg_scale",
        ),
        (
            {"guides_by_passes": True},
            {"negative_prompt": "n", "true_cfg_scale": 2.0},
            "tiny takes guidance_scale, not true_cfg_scale",
        ),
    ],
)
def test_a_model_refuses_guidance_that_it_does_not_have(
    facts: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    plain = dataclasses.replace(INTAKE, card=dataclasses.replace(CARD, **facts))
    with pytest.raises(InvalidRequest, match=message) as caught:
        take(plain, **options)
    assert caught.value.param in options


def test_any_aspect_within_the_measured_range_is_served() -> None:
    assert take(size="128x512").shape == Shape(height=512, width=128)
    assert take(size="256x1024").shape == Shape(height=1024, width=256)


def test_a_size_that_a_wider_degree_was_not_measured_for_is_still_served() -> None:
    narrow = dataclasses.replace(PROFILE, rows=tuple(row for row in PROFILE.rows if row.seconds != 0.06))
    request = take(dataclasses.replace(INTAKE, cost=ProfileCost(narrow)), size="256x512", num_steps=1)
    assert request.deadline_s == pytest.approx(1000.0 + 3.0 * (0.5 + 0.2 + 0.4))


def test_a_request_may_pin_its_degrees() -> None:
    assert take().degrees is None
    pinned = take(degrees=(2, 1))
    assert pinned.degrees == (1, 2)
    assert take(max_sequence_length=63).max_sequence_length == 63  # which degree 2 does not divide
    narrow = take(degrees=(2,))
    assert list(INTAKE.cost.times(narrow, narrow.stepped)) == [2]
    assert list(INTAKE.cost.times(pinned, pinned.stage_of(DENOISE))) == [1, 2]


@pytest.mark.parametrize("degrees", [(3,), (1, 4), (), (0,), (-1,)])
def test_a_degree_that_the_size_cannot_run_at_is_refused(degrees: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest, match=r"degrees is \[.*\]; allowed for 512x512: one or more of 1, 2") as error:
        take(degrees=degrees)
    assert error.value.param == "degrees"


def test_a_degree_that_the_policy_never_gives_is_refused_instead_of_waiting_for_ever() -> None:
    with pytest.raises(InvalidRequest, match="one or more of 1$"):
        take(dataclasses.replace(INTAKE, max_degree=1), degrees=(2,))


def test_fewer_steps_than_the_schedule_of_the_model_allows_are_refused() -> None:
    stretched = dataclasses.replace(INTAKE, card=dataclasses.replace(INTAKE.card, min_num_steps=2))
    with pytest.raises(InvalidRequest, match="num_steps is 1; allowed: 2 to 100") as caught:
        take(stretched, num_steps=1)
    assert caught.value.param == "num_steps"
    assert take(stretched, num_steps=2).num_steps == 2
