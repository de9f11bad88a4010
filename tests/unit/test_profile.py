"""The profile file and what is read off it: every mistake is named, nothing is guessed."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetriserve.core.errors import ProfileError
from tetriserve.core.execution import Execution
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, image_stages
from tetriserve.profile import Profile, ProfileCost, Row, load_profile, save_profile
from tetriserve.profile.corrections import MAX_ENTRIES, Corrections
from tetriserve.profile.table import FORMAT


def denoise_row(side: int, degree: int, step_s: float, **rest: Any) -> Row:
    tokens = side * side // 1024
    return Row(stage=DENOISE, height=side, width=side, tokens=tokens, degree=degree, seconds=step_s, **rest)


PROFILE = Profile(
    model="tiny",
    fingerprint="abc",
    hardware="4 cores",
    execution=Execution("float32"),
    source="by hand",
    created="2026-01-01",
    switch_s=0.001,
    rows=(
        Row(stage=ENCODE, seconds=0.02),
        *(
            denoise_row(256, 1, 0.1, cv=0.05),
            denoise_row(512, 1, 0.4),
            denoise_row(1024, 1, 2.8),
            denoise_row(256, 2, 0.06),
            denoise_row(512, 2, 0.22),
            denoise_row(1024, 2, 1.5),
        ),
        *(
            Row(stage=DECODE, height=256, width=256, seconds=0.2),
            Row(stage=DECODE, height=512, width=512, seconds=0.8),
            Row(stage=DECODE, height=1024, width=1024, seconds=3.5),
        ),
    ),
)
DOCUMENT: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(PROFILE)}))
FIRST: dict[str, Any] = {
    **{name: value for name, value in DOCUMENT.items() if name != "rows"},
    "format": "tetriserve-profile/1",
    "encode_s": 0.02,
    "denoise": [
        {**{name: value for name, value in row.items() if name not in ("stage", "seconds")}, "step_s": row["seconds"]}
        for row in DOCUMENT["rows"]
        if row["stage"] == DENOISE
    ],
    "decode": [
        {**{name: row[name] for name in ("height", "width", "frames")}, "decode_s": row["seconds"]}
        for row in DOCUMENT["rows"]
        if row["stage"] == DECODE
    ],
}
"""`PROFILE` as the first format has it."""


ENCODING, DECODING = Task(("r",), ENCODE, (0,)), Task(("r",), DECODE, (0,))


def step(degree: int, num_steps: int = 1) -> Task:
    return Task(("r",), DENOISE, tuple(range(degree)), num_steps)


def request(height: int, width: int, num_passes: int = 1) -> Request:
    return Request(
        request_id="r",
        prompt="p",
        shape=Shape(height, width),
        stages=image_stages(4, num_passes),
        seed=0,
        arrival_s=0.0,
        deadline_s=9.0,
    )


def times(cost: ProfileCost, request: Request, kind: str, batch: int = 1) -> Mapping[int, float]:
    return cost.times(request, next(stage for stage in request.stages if stage.kind == kind), batch)


def test_a_saved_profile_loads_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "directory" / "p.json"
    save_profile(PROFILE, path)
    assert load_profile(path) == PROFILE
    assert [file.name for file in path.parent.iterdir()] == ["p.json"]


def test_a_profile_that_cannot_be_written_is_one_line_with_its_name_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "p.json").mkdir()
    with pytest.raises(ProfileError, match=re.escape(f"profile {tmp_path / 'p.json'} cannot be written: ")):
        save_profile(PROFILE, tmp_path / "p.json")
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]
    (tmp_path / "file").touch()
    with pytest.raises(ProfileError, match="cannot be written: File exists"):
        save_profile(PROFILE, tmp_path / "file" / "p.json")


def test_a_profile_lists_its_degrees_and_its_shapes_smallest_first() -> None:
    assert PROFILE.degrees == (1, 2)
    assert PROFILE.shapes == (Shape(256, 256), Shape(512, 512), Shape(1024, 1024))


def test_optional_fields_may_be_left_out(tmp_path: Path) -> None:
    document = copy.deepcopy(DOCUMENT)
    del document["fingerprint"]
    for row in document["rows"]:
        del row["frames"], row["batch"], row["cv"]
    (tmp_path / "p.json").write_text(json.dumps(document))
    loaded = load_profile(tmp_path / "p.json")
    assert loaded.fingerprint == ""
    assert {(row.frames, row.batch, row.cv) for row in loaded.rows} == {(1, 1, None)}


def test_files_of_the_first_format_load_as_the_same_profile(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(FIRST))
    assert load_profile(tmp_path / "p.json") == PROFILE


DELETE = object()
READABLE = "this version reads 'tetriserve-profile/2' and 'tetriserve-profile/1'"


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["format"], "other/1", f"format is 'other/1'; {READABLE}"),
        (["format"], DELETE, f"format is None; {READABLE}"),
        (["model"], DELETE, "profile lacks the field 'model'"),
        (["encode_s"], DELETE, "profile lacks the field 'encode_s'"),
        (["speed"], 1, "profile has the unknown field 'speed'"),
        (["model"], 3, "model must be a string"),
        (["fingerprint"], None, "fingerprint must be a string"),
        (["encode_s"], "fast", "encode_s is 'fast'; it must be a number of seconds from 1e-06"),
        (["encode_s"], -0.5, "encode_s is -0.5; it must be a number of seconds from 1e-06"),
        (["switch_s"], 0, "switch_s is 0; it must be a number of seconds from 1e-06"),
        (["move_s"], -0.1, "move_s is -0.1; it must be a number of seconds from 1e-06"),
        (["team_s"], -0.1, "team_s is -0.1; it must be a number of seconds from 1e-06"),
        (["team_s"], float("nan"), "team_s is nan; it must be a number of seconds from 1e-06"),
        (["team_s"], "slow", "team_s is 'slow'; it must be a number of seconds from 1e-06"),
        (["team_s"], 1e5, "team_s is 100000; it must be a number of seconds from 1e-06 to 10000"),
        (["switch_s"], True, "switch_s is True; it must be a number of seconds from 1e-06"),
        (["switch_s"], float("nan"), "switch_s is nan; it must be a number of seconds from 1e-06"),
        (["switch_s"], float("inf"), "switch_s is inf; it must be a number of seconds from 1e-06"),
        (["denoise"], DELETE, "denoise must be a list of rows"),
        (["denoise"], {}, "denoise must be a list of rows"),
        (["denoise"], [], "profile has no denoise rows"),
        (["decode"], [], "profile has no decode rows"),
        (["denoise", 2], 7, "denoise[2] must be an object"),
        (["denoise", 2, "tokens"], DELETE, "denoise[2] lacks the field 'tokens'"),
        (["denoise", 2, "step_ms"], 5, "denoise[2] has the unknown field 'step_ms'"),
        (["denoise", 2, "step_s"], float("nan"), "denoise[2].step_s is nan; it must be a number of seconds from 1e-06"),
        (["denoise", 2, "step_s"], 10**400, "denoise[2].step_s is "),
        (["denoise", 2, "step_s"], None, "denoise[2].step_s is None; it must be a number of seconds from 1e-06"),
        (["denoise", 2, "degree"], 0, "denoise[2].degree is 0; it must be a whole number of at least 1"),
        (["denoise", 2, "height"], 1.5, "denoise[2].height is 1.5; it must be a whole number of at least 1"),
        (["denoise", 2, "batch"], "1", "denoise[2].batch is '1'; it must be a whole number of at least 1"),
        (["denoise", 2, "cv"], "low", "denoise[2].cv is 'low'; it must be null or a number from 0 to 1000"),
        (["denoise", 2, "cv"], -1.0, "denoise[2].cv is -1; it must be null or a number from 0 to 1000"),
        (["denoise", 2], FIRST["denoise"][1], "profile has two rows for denoise of 512x512 at degree 1, batch 1"),
        (["decode", 1, "decode_s"], -1, "decode[1].decode_s is -1; it must be a number of seconds from 1e-06"),
        (["decode", 1, "width"], False, "decode[1].width is False; it must be a whole number of at least 1"),
        (["decode", 1], FIRST["decode"][0], "profile has two rows for decode of 256x256 at degree 1, batch 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_of_the_first_format_is_one_line_with_file_and_field(
    tmp_path: Path, where: list[Any], value: Any, message: str
) -> None:
    check_mistake(tmp_path, copy.deepcopy(FIRST), where, value, message)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["rows"], DELETE, "rows must be a list of rows"),
        (["rows"], [], "profile has no row with tokens; a stage whose sequence is shared needs them"),
        (["rows", 2], 7, "rows[2] must be an object"),
        (["rows", 2, "seconds"], DELETE, "rows[2] lacks the field 'seconds'"),
        (["rows", 2, "step_s"], 5, "rows[2] has the unknown field 'step_s'"),
        (["rows", 2, "seconds"], float("nan"), "rows[2].seconds is nan; it must be a number of seconds from 1e-06"),
        (["rows", 2, "stage"], 3, "rows[2].stage is 3; it must be the name of a stage"),
        (["rows", 2, "stage"], "", "rows[2].stage is ''; it must be the name of a stage"),
        (["rows", 2, "width"], None, "rows[2] has a part of a size; it needs height and width, or neither"),
        (["rows", 0, "tokens"], 64, "rows[0] has a part of a size; it needs height and width, or neither"),
        (["rows", 2, "batch"], 0, "rows[2].batch is 0; it must be a whole number of at least 1"),
        (["rows", 2, "batch"], None, "rows[2].batch is None; it must be a whole number of at least 1"),
        (["rows", 2, "batch"], 2, "profile has a row for denoise of 512x512 at degree 1, batch 2, but none for"),
        (["rows", 2], DOCUMENT["rows"][1], "profile has two rows for denoise of 256x256 at degree 1, batch 1"),
        (
            ["rows", 2],
            {**DOCUMENT["rows"][1], "batch": 2, "seconds": 0.09},
            "profile: denoise of 256x256 at degree 1 takes 0.1 s for a batch of 1, but 0.09 s for 2; a larger batch "
            "takes no less",
        ),
        (["rows", 9, "height"], 900, "profile has no decode row that covers 1024x1024; they go from 256x256 to"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_one_line_with_file_and_field(
    tmp_path: Path, where: list[Any], value: Any, message: str
) -> None:
    check_mistake(tmp_path, copy.deepcopy(DOCUMENT), where, value, message)


def check_mistake(tmp_path: Path, document: dict[str, Any], where: list[Any], value: Any, message: str) -> None:
    parent = document
    for key in where[:-1]:
        parent = parent[key]
    if value is DELETE:
        del parent[where[-1]]
    else:
        parent[where[-1]] = value
    path = tmp_path / "p.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert str(caught.value).startswith(f"profile {path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON: Expecting value"),
        (b"{", "is not JSON: Expecting property name"),
        (b"\xff\xfe\x00", "is not UTF-8 text: invalid start byte at byte 0"),
        (b"[" * 100_000, "is not JSON: "),
        (b"[]", "format is 'list'"),
        (b"null", "format is 'NoneType'"),
    ],
)
def test_a_file_that_is_no_profile_at_all_is_one_line_with_its_name(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=re.escape(message)) as caught:
        load_profile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_a_directory_is_one_line_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=re.escape(f"profile {tmp_path / 'no'} cannot be read: No such file")):
        load_profile(tmp_path / "no")
    with pytest.raises(ProfileError, match=re.escape(f"profile {tmp_path} cannot be read: Is a directory")):
        load_profile(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(min_value=10**320) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def paths_into(value: Any) -> list[tuple[Any, ...]]:
    """The way to every part of a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(), *((key, *rest) for key, inner in items for rest in paths_into(inner))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = copy.copy(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


@given(path=st.sampled_from(paths_into(DOCUMENT)), new=json_values)
def test_any_json_is_a_profile_or_a_profile_error(
    tmp_path_factory: pytest.TempPathFactory, path: tuple[Any, ...], new: Any
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_text(json.dumps(replaced(DOCUMENT, path, new)))
    try:
        profile = load_profile(file)
    except ProfileError as error:
        assert str(error).startswith(f"profile {file}")
        assert len(str(error).splitlines()) == 1
    else:
        assert isinstance(profile, Profile)
        assert all(0 < row.seconds < float("inf") for row in profile.rows)


def test_measured_shapes_are_looked_up_exactly() -> None:
    cost = ProfileCost(PROFILE)
    assert dict(times(cost, request(256, 256), DENOISE)) == {1: 0.1, 2: 0.06}
    assert dict(times(cost, request(1024, 1024), DENOISE)) == {1: 2.8, 2: 1.5}
    assert (times(cost, request(256, 256), ENCODE)[1], cost.switch_s, cost.team_s) == (0.02, 0.001, 0.0)
    assert ProfileCost(dataclasses.replace(PROFILE, team_s=0.7)).team_s == 0.7
    assert [times(cost, request(side, side), DECODE)[1] for side in (256, 512, 1024)] == [0.2, 0.8, 3.5]


@pytest.mark.parametrize(
    ("height", "width", "step_s", "decode_s"),
    [
        (256, 512, 0.1 + 0.3 * 64 / 192, 0.2 + 0.6 / 3),  # 128 tokens, between 64 and 256
        (512, 256, 0.1 + 0.3 * 64 / 192, 0.2 + 0.6 / 3),
        (512, 1024, 0.4 + 2.4 * 256 / 768, 0.8 + 2.7 / 3),  # 512 tokens, between 256 and 1024
        (128, 512, 0.1, 0.2),  # as many tokens as 256x256
        (768, 768, 0.4 + 2.4 * 320 / 768, 0.8 + 2.7 * 327680 / 786432),  # 576 tokens
    ],
)
def test_in_between_times_are_linear_in_tokens_whatever_the_aspect(
    height: int, width: int, step_s: float, decode_s: float
) -> None:
    cost = ProfileCost(PROFILE)
    assert times(cost, request(height, width), DENOISE)[1] == pytest.approx(step_s)
    assert times(cost, request(height, width), DECODE)[1] == pytest.approx(decode_s)


SHARED = dataclasses.replace(
    PROFILE,
    rows=(
        *PROFILE.rows,
        *(
            Row(stage=DECODE, height=side, width=side, degree=degree, seconds=seconds / degree + 0.1)
            for side, seconds in ((512, 0.8), (1024, 3.5))
            for degree in (2, 4)
            if side > 512 or degree == 2
        ),
    ),
)
"""Decodes of 512x512 are shared by 2 ranks, those of 1024x1024 by 4 too."""


def test_a_decode_has_the_degrees_that_were_measured_at_its_size_or_on_both_sides_of_it() -> None:
    cost = ProfileCost(SHARED)
    assert dict(times(cost, request(256, 256), DECODE)) == {1: 0.2}
    assert dict(times(cost, request(256, 512), DECODE)) == {1: pytest.approx(0.4)}
    assert dict(times(cost, request(512, 512), DECODE)) == {1: 0.8, 2: 0.5}
    between = {1: pytest.approx(0.8 + 2.7 / 3), 2: pytest.approx(0.5 + 1.35 / 3)}
    assert dict(times(cost, request(512, 1024), DECODE)) == between
    assert dict(times(cost, request(1024, 1024), DECODE)) == {1: 3.5, 2: 1.85, 4: 0.975}
    assert SHARED.degrees == (1, 2), "those of steps"


def test_a_decode_has_no_degree_that_its_own_tiles_do_not_allow() -> None:
    """A size between two others may have fewer tiles than both."""
    limited = request(512, 1024)

    def short_degrees(kind: str, shape: Shape) -> tuple[int, ...]:
        assert kind in (ENCODE, DECODE)
        return (1,) if shape == limited.shape else (1, 2)

    cost = ProfileCost(SHARED, short_degrees_of=short_degrees)
    cost = cost.observed(DECODING, limited, 1.7)
    assert [*times(cost, limited, DECODE)] == [1]
    assert [*times(cost, request(1024, 1024), DECODE)] == [1, 2]
    assert [*times(cost, limited, ENCODE)] == [1]
    assert [*times(cost, limited, DENOISE)] == [1, 2]


def test_every_size_needs_a_decode_at_the_narrowest_degree() -> None:
    rows = [row for row in SHARED.rows if (row.stage, row.degree, row.height) != (DECODE, 1, 1024)]
    with pytest.raises(ProfileError, match="profile has no decode row that covers 1024x1024; they go from 256x256 to"):
        dataclasses.replace(SHARED, rows=tuple(rows))


@pytest.mark.parametrize("side", [128, 224, 1056, 2048])
def test_outside_the_measured_range_is_an_error_that_names_it(side: int) -> None:
    cost, tokens = ProfileCost(PROFILE), side * side // 1024
    message = f"a step of {side}x{side} at degree 1 is {tokens} tokens, outside the profile's range 64 to 1024"
    with pytest.raises(ProfileError, match=re.escape(message)):
        times(cost, request(side, side), DENOISE)
    message = f"decode of {side}x{side} is {side * side:g} pixels, outside the profile's range 65536 to 1.04858e+06"
    with pytest.raises(ProfileError, match=re.escape(message)):
        times(cost, request(side, side), DECODE)[1]


def test_a_degree_that_is_allowed_but_not_in_the_profile_is_an_error_not_a_guess() -> None:
    cost = ProfileCost(PROFILE, lambda shape: (1, 4))
    with pytest.raises(ProfileError, match=re.escape("profile has no row at degree 4; it has [1, 2]")):
        times(cost, request(256, 256), DENOISE)


def test_a_shape_runs_only_at_the_degrees_allowed_for_it() -> None:
    cost = ProfileCost(PROFILE, lambda shape: (1,) if shape.width == 256 else (1, 2))
    assert list(times(cost, request(256, 256), DENOISE)) == [1]
    assert list(times(cost, request(512, 512), DENOISE)) == [1, 2]
    with pytest.raises(ProfileError, match=re.escape("256x256 can run at none of the degrees [1, 2]")):
        times(ProfileCost(PROFILE, lambda shape: ()), request(256, 256), DENOISE)


def test_a_degree_measured_only_for_other_sizes_is_left_out_of_a_shape_beyond_them() -> None:
    narrow = dataclasses.replace(PROFILE, rows=tuple(row for row in PROFILE.rows if row.seconds != 0.06))
    assert list(times(ProfileCost(narrow), request(256, 512), DENOISE)) == [1]
    assert list(times(ProfileCost(narrow), request(512, 1024), DENOISE)) == [1, 2]


def test_two_forwards_per_step_double_steps_and_encode_but_not_decode() -> None:
    cost = ProfileCost(PROFILE)
    guided = request(256, 256, num_passes=2)
    assert dict(times(cost, guided, DENOISE)) == {1: 0.2, 2: 0.12}
    assert times(cost, guided, ENCODE)[1] == 0.04
    assert times(cost, guided, DECODE)[1] == 0.2
    assert dict(times(cost, request(256, 256), DENOISE)) == {1: 0.1, 2: 0.06}


BATCHED = dataclasses.replace(
    PROFILE,
    rows=(
        *PROFILE.rows,
        denoise_row(256, 1, 0.12, batch=2),
        denoise_row(256, 1, 0.18, batch=4),
        denoise_row(512, 1, 0.7, batch=2),
    ),
)


def test_batched_rows_do_not_stand_in_for_single_requests() -> None:
    assert times(ProfileCost(BATCHED), request(256, 256), DENOISE)[1] == 0.1


def test_a_batch_that_nobody_measured_costs_the_sum() -> None:
    cost = ProfileCost(PROFILE)
    for kind in (ENCODE, DENOISE, DECODE):
        single = times(cost, request(256, 256), kind)
        assert dict(times(cost, request(256, 256), kind, batch=3)) == {k: 3 * seconds for k, seconds in single.items()}


@pytest.mark.parametrize(("batch", "seconds"), [(2, 0.12), (3, 0.15), (4, 0.18), (6, 0.27)])
def test_batches_are_looked_up_interpolated_and_beyond_the_largest_as_dear_as_in_it(batch: int, seconds: float) -> None:
    at = times(ProfileCost(BATCHED), request(256, 256), DENOISE, batch)
    assert at[1] == pytest.approx(seconds)
    assert at[2] == pytest.approx(batch * 0.06)  # measured at degree 1 alone


def test_a_batch_of_a_size_in_between_is_interpolated_as_far_as_batches_were_measured_around_it() -> None:
    cost, between = ProfileCost(BATCHED), request(256, 512)  # 128 tokens, of 64 to 256
    assert times(cost, between, DENOISE, batch=2)[1] == pytest.approx(0.12 + (0.7 - 0.12) / 3)
    beyond = request(512, 1024)
    assert times(cost, beyond, DENOISE, batch=2)[1] == pytest.approx(2 * times(cost, beyond, DENOISE)[1])


def test_passes_count_one_after_the_other_or_as_one_larger_batch_whichever_is_quicker() -> None:
    cost, guided = ProfileCost(BATCHED), request(256, 256, num_passes=2)
    assert times(cost, guided, DENOISE, batch=2)[1] == pytest.approx(0.18)  # four together, not two and two
    assert times(cost, guided, DENOISE, batch=4)[1] == pytest.approx(0.36)  # eight were not measured
    joins = [cost.joins_passes(guided, guided.stepped, 1, batch) for batch in (1, 2, 4)]
    assert joins == [False, True, False]
    assert times(cost, guided, DENOISE)[1] == pytest.approx(0.2), "alone as its own pipeline does it"
    slower = dataclasses.replace(BATCHED, rows=(*BATCHED.rows[:-2], denoise_row(256, 1, 0.3, batch=4)))
    assert not ProfileCost(slower).joins_passes(guided, guided.stepped, 1, 2)


def test_an_observed_batch_corrects_its_own_size_and_says_something_of_others_not_observed_yet() -> None:
    small = request(256, 256)
    cost = ProfileCost(BATCHED).observed(Task(("r", "s"), DENOISE, (0,), 1), small, 0.24)
    assert times(cost, small, DENOISE, batch=2)[1] == pytest.approx(0.12 * 1.2)
    assert times(cost, small, DENOISE)[1] == pytest.approx(0.1 * 1.2)
    cost = cost.observed(step(1), small, 0.12)
    assert times(cost, small, DENOISE)[1] == pytest.approx(0.1 * 1.2)
    cost = cost.observed(step(1), small, 0.06)
    assert times(cost, small, DENOISE)[1] < times(cost, small, DENOISE, batch=2)[1]


def test_an_observation_moves_the_estimate_a_fifth_of_the_way_and_leaves_the_original_unchanged() -> None:
    before, small = ProfileCost(PROFILE), request(256, 256)
    times(before, small, DENOISE)
    once = before.observed(step(1), small, 0.2)
    twice = once.observed(step(1), small, 0.2)
    assert times(before, small, DENOISE)[1] == 0.1
    assert times(once, small, DENOISE)[1] == pytest.approx(0.1 * 1.2)
    assert times(twice, small, DENOISE)[1] == pytest.approx(0.1 * (1.2 + 0.2 * 0.8))
    assert before.corrections == Corrections()


def test_a_degree_never_observed_shares_the_mean_correction_of_the_shape_and_other_shapes_none() -> None:
    small, large = request(256, 256), request(512, 512)
    cost = ProfileCost(PROFILE).observed(step(1), small, 0.2)
    assert times(cost, small, DENOISE)[2] == pytest.approx(0.06 * 1.2)
    assert dict(times(cost, large, DENOISE)) == {1: 0.4, 2: 0.22}
    cost = cost.observed(step(2), small, 0.06)  # starts from the shared 1.2, not from 1
    assert times(cost, small, DENOISE)[2] == pytest.approx(0.06 * (1.2 - 0.2 * 0.2))
    # and degree 1, not observed this time, drifts a fiftieth of the way towards it
    assert times(cost, small, DENOISE)[1] == pytest.approx(0.1 * (1.2 + 0.02 * (1.16 - 1.2)))


def test_a_degree_that_seemed_slow_once_is_forgiven_in_time() -> None:
    small = request(256, 256)
    cost = ProfileCost(PROFILE)
    for _ in range(5):
        cost = cost.observed(step(2), small, 0.6)
    assert times(cost, small, DENOISE)[2] > 0.12
    for _ in range(200):  # nobody runs it at degree 2 any more
        cost = cost.observed(step(1), small, 0.1)
    assert times(cost, small, DENOISE)[2] == pytest.approx(0.06, rel=0.05)


def test_repeated_observations_converge_and_one_outlier_is_bounded() -> None:
    small = request(256, 256)
    cost = ProfileCost(PROFILE)
    for _ in range(40):
        cost = cost.observed(step(1), small, 0.03)
    assert times(cost, small, DENOISE)[1] == pytest.approx(0.03, rel=1e-3)
    assert times(ProfileCost(PROFILE).observed(step(1), small, 1000.0), small, DENOISE)[1] == pytest.approx(0.1 * 1.2)
    assert times(ProfileCost(PROFILE).observed(step(1), small, 1e-9), small, DENOISE)[1] == pytest.approx(0.1 * 0.82)


def test_encode_is_corrected_for_all_requests_and_decode_for_its_shape() -> None:
    small, large = request(256, 256), request(512, 512)
    guided = request(256, 256, num_passes=2)
    cost = ProfileCost(PROFILE).observed(ENCODING, guided, 0.08).observed(DECODING, small, 0.1)
    assert [times(cost, each, ENCODE)[1] for each in (small, guided, large)] == pytest.approx([0.024, 0.048, 0.024])
    assert [times(cost, each, DECODE)[1] for each in (small, large)] == pytest.approx([0.2 * 0.9, 0.8])
    assert times(cost, small, DENOISE) == times(ProfileCost(PROFILE), small, DENOISE)


def test_a_decode_profiled_eight_times_too_long_is_right_after_twenty_pictures() -> None:
    cost, large = ProfileCost(PROFILE), request(1024, 1024)
    for _ in range(20):
        cost = cost.observed(DECODING, large, 3.5 / 8)
    assert times(cost, large, DECODE)[1] == pytest.approx(3.5 / 8, rel=0.1)


def test_an_observed_step_of_two_forwards_corrects_the_time_of_one() -> None:
    guided = request(256, 256, num_passes=2)
    cost = ProfileCost(PROFILE).observed(step(1), guided, 0.4)
    assert times(cost, guided, DENOISE)[1] == pytest.approx(0.24)
    assert times(cost, request(256, 256), DENOISE)[1] == pytest.approx(0.12)


def test_thousands_of_sizes_leave_a_bounded_memory_and_the_ones_in_use_keep_their_corrections() -> None:
    cost, usual = ProfileCost(PROFILE), request(512, 512)
    for number in range(2000):
        cost = cost.observed(step(1), usual, 0.8)
        odd = request(256 + number % 700, 256 + number // 700)
        times(cost, odd, DENOISE)
        times(cost, odd, DECODE)[1]
        cost = cost.observed(step(2), odd, 0.5)
        cost = cost.observed(DECODING, odd, 0.5)
    assert len(cost.corrections.factors) == len(cost._profiled) == MAX_ENTRIES
    assert len(cost._memo) <= MAX_ENTRIES
    assert times(cost, usual, DENOISE)[1] == pytest.approx(0.8)
