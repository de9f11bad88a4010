"""Times of sizes between the largest that was measured and OpenAI's largest."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tetriserve.core.errors import InvalidRequest
from tetriserve.core.execution import Execution
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.engine.intake import Generation, Intake
from tetriserve.models.card import ModelCard
from tetriserve.profile import Profile, ProfileCost, Row
from tetriserve.profile.estimate import LARGEST, with_largest

CARD = ModelCard(
    name="tiny", path=Path("tiny"), family="flux", pipeline_class="FluxPipeline",
    execution=Execution("float32"), size_multiple=32, pixels_per_token=32, num_heads=8, num_text_tokens=64,
    default_num_steps=20, default_guidance_scale=3.5, has_guidance=True, has_negative_prompt=True,
    sizes=(Shape(512, 512), Shape(1024, 1024)), fingerprint="abc",
)  # fmt: skip
OPENAI_SIZES = ("1024x1024", "1024x1536", "1536x1024", "1792x1024", "1024x1792", "256x256", "512x512", "auto")


def profile_of(*sides: int, exponent: float = 1.5, degrees: tuple[int, ...] = (1, 2)) -> Profile:
    """Steps grow with that power of the pixels, decodes with the pixels."""

    def seconds(side: int) -> float:
        return 0.1 * (side / 256) ** (2 * exponent)

    return Profile(
        model="tiny", hardware="h", execution=Execution("float32"), source="s", created="c", switch_s=0.001,
        rows=(
            Row(stage=ENCODE, seconds=0.5),
            *(
                Row(stage=DENOISE, height=side, width=side, tokens=side * side // 1024, degree=degree,
                    seconds=seconds(side) / degree, cv=0.1)
                for side in sides for degree in degrees
            ),
            *(Row(stage=DECODE, height=side, width=side, seconds=0.2 * (side / 256) ** 2) for side in sides),
        ),
    )  # fmt: skip


def intake_of(profile: Profile) -> Intake:
    return Intake(card=CARD, cost=ProfileCost(profile, estimates=with_largest(profile, CARD.size_multiple)))


def request_of(intake: Intake, size: str) -> Request:
    generation = Generation(prompt="a cat", size=size)
    return intake.request(generation, request_id="id", seed=7, now=0.0, cost=intake.cost)


@pytest.mark.parametrize("size", OPENAI_SIZES)
@pytest.mark.parametrize("sides", [(256, 512, 1024), (256, 1024, 2048)])
def test_openais_sizes_are_served_by_models_measured_up_to_1024(sides: tuple[int, ...], size: str) -> None:
    intake = intake_of(profile_of(*sides))
    request = request_of(intake, size)
    assert size in ("auto", str(request.shape))
    for stage in request.stages:
        assert all(seconds > 0 for seconds in intake.cost.times(request, stage).values())


def test_times_go_on_as_they_grew_between_the_two_largest() -> None:
    cost = intake_of(profile_of(256, 512, 1024)).cost
    request = request_of(intake_of(cost.profile), "1792x1024")
    steps = cost.times(request, request.stepped)
    one_s = 0.1 * 16**1.5 * 1.75**1.5
    assert steps == pytest.approx({1: one_s, 2: one_s / 2})
    assert cost.times(request, request.stage_of(DECODE)) == pytest.approx({1: 0.2 * 16 * 1.75})


@pytest.mark.parametrize(("exponent", "growth"), [(0.5, 1.75), (3.0, 1.75**2)])
def test_they_grow_no_slower_than_the_size_and_no_faster_than_its_square(exponent: float, growth: float) -> None:
    profile = with_largest(profile_of(512, 1024, exponent=exponent), 32)
    rows = {row.shape: row.seconds for row in profile.rows_of(DENOISE) if row.degree == 1}
    assert rows[LARGEST] == pytest.approx(rows[Shape(1024, 1024)] * growth)


def test_one_measured_size_is_enough() -> None:
    rows = {row.shape: row.seconds for row in with_largest(profile_of(1024), 32).rows_of(DENOISE) if row.degree == 1}
    assert rows[LARGEST] == pytest.approx(rows[Shape(1024, 1024)] * 1.75)


@pytest.mark.parametrize(
    ("profile", "multiple"), [(profile_of(256, 512), 32), (profile_of(1024, 2048), 32), (profile_of(512, 1024), 768)]
)
def test_nothing_is_estimated_where_it_is_too_far_covered_or_no_size(profile: Profile, multiple: int) -> None:
    assert with_largest(profile, multiple) is profile


def test_beyond_openais_largest_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(InvalidRequest, match=r"2097152 pixels; allowed: 65536 \(256x256\) to 1835008 \(1792x1024\)"):
        request_of(intake_of(profile_of(256, 1024)), "2048x1024")


def test_the_profile_and_what_is_measured_stay_as_they_are() -> None:
    profile = profile_of(256, 512, 1024)
    intake = intake_of(profile)
    assert intake.cost.profile is profile
    assert intake.shapes[-1] == Shape(1024, 1024)
    assert LARGEST not in intake.sizes


def test_what_is_observed_corrects_an_estimate() -> None:
    intake = intake_of(profile_of(512, 1024))
    request = request_of(intake, "1792x1024")
    cost = intake.cost
    estimated_s = cost.times(request, request.stepped)[1]
    for _ in range(200):
        cost = cost.observed(Task((request.request_id,), DENOISE, (0,), 1), request, 2 * estimated_s)
    assert cost.times(request, request.stepped)[1] == pytest.approx(2 * estimated_s, rel=0.05)
    assert cost.largest == LARGEST


def test_a_degree_that_was_not_measured_so_far_is_not_estimated() -> None:
    profile = profile_of(512, 1024)
    rows = tuple(row for row in profile.rows if (row.degree, row.width) != (2, 1024))
    intake = intake_of(dataclasses.replace(profile, rows=rows))
    request = request_of(intake, "1792x1024")
    assert list(intake.cost.times(request, request.stepped)) == [1]


def test_decodes_that_ranks_share_are_estimated_by_degree() -> None:
    profile = profile_of(512, 1024)
    shared = [
        Row(stage=DECODE, height=side, width=side, degree=2, seconds=0.1 * (side / 256) ** 2) for side in (512, 1024)
    ]
    estimated = with_largest(dataclasses.replace(profile, rows=(*profile.rows, *shared)), CARD.size_multiple)
    found = {row.degree: row.seconds for row in estimated.rows_of(DECODE) if row.shape == LARGEST}
    assert found == {1: pytest.approx(3.2 * 1.75), 2: pytest.approx(1.6 * 1.75)}
