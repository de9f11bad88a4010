"""What was learnt about a profile is kept for the next start: for that profile on that hardware, within bounds."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_profile import PROFILE, json_values, paths_into, replaced
from tetriserve.core.errors import ProfileError
from tetriserve.core.execution import Execution
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.profile import load_profile, save_profile
from tetriserve.profile.corrections import MAX_ENTRIES, RANGE, Case, Corrections
from tetriserve.profile.learnt import load_corrections, save_corrections

LEARNT = Corrections(
    {
        Case(DENOISE, Shape(512, 512), 2): 0.5,
        Case(ENCODE, None): 1.25,
        Case(DENOISE, Shape(256, 256), 1): 2.0,
        Case(DENOISE, Shape(256, 512), 1, batch=4): 1.0,
        Case(DECODE, Shape(512, 512)): 0.125,
        Case(DECODE, Shape(256, 256, 17)): 10.0,
    }
)


def document(path: Path) -> dict[str, Any]:
    save_corrections(LEARNT, path, PROFILE, "here")
    return json.loads(path.read_text())


def test_what_was_saved_is_loaded_in_its_order_for_the_profile_as_read_from_its_file(tmp_path: Path) -> None:
    save_corrections(LEARNT, tmp_path / "new/c.json", PROFILE, "here")
    save_profile(PROFILE, tmp_path / "p.json")
    loaded = load_corrections(tmp_path / "new/c.json", load_profile(tmp_path / "p.json"), "here")
    assert loaded == LEARNT
    assert list(loaded.factors) == list(LEARNT.factors)  # the longest unobserved is forgotten first


def test_without_a_file_there_is_nothing_to_correct(tmp_path: Path) -> None:
    assert load_corrections(tmp_path / "no.json", PROFILE, "here") == Corrections()


def test_corrections_of_another_profile_or_other_hardware_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    save_corrections(LEARNT, path, PROFILE, "here")
    for other in (
        dataclasses.replace(PROFILE, switch_s=0.002),  # measured anew
        dataclasses.replace(PROFILE, fingerprint="xyz"),
        dataclasses.replace(PROFILE, execution=Execution("bfloat16")),
    ):
        assert load_corrections(path, other, "here") == Corrections()
    assert load_corrections(path, PROFILE, "there") == Corrections()
    assert load_corrections(path, PROFILE, "here") == LEARNT


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[]", b"7", b"{}", b"[" * 100_000, b" " * (2 << 20)],
    ids=["empty", "cut off", "not text", "a list", "a number", "no fields", "deep", "large"],
)
def test_a_damaged_file_is_one_line_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(ProfileError) as caught:
        load_corrections(path, PROFILE, "here")
    assert str(caught.value).startswith(f"corrections {path} are damaged: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_table_of_any_length_and_a_pipe_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    damaged = document(path)
    damaged["factors"] = [damaged["factors"][0]] * (MAX_ENTRIES + 1)
    path.write_text(json.dumps(damaged))
    with pytest.raises(ProfileError, match="at most 1024 rows"):
        load_corrections(path, PROFILE, "here")
    os.mkfifo(tmp_path / "pipe")
    assert load_corrections(tmp_path / "pipe", PROFILE, "here") == Corrections()


def test_corrections_that_cannot_be_written_are_one_line_with_their_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ProfileError, match="corrections .* cannot be written: "):
        save_corrections(LEARNT, tmp_path / "file/c.json", PROFILE, "here")


@given(new=json_values, data=st.data())
def test_any_json_in_any_place_gives_bounded_corrections_or_a_profile_error(
    tmp_path_factory: pytest.TempPathFactory, new: Any, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-corrections.json"
    whole = document(path)
    path.write_text(json.dumps(replaced(whole, data.draw(st.sampled_from(paths_into(whole))), new)))
    try:
        loaded = load_corrections(path, PROFILE, "here")
    except ProfileError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert all(RANGE[0] <= factor <= RANGE[1] for factor in loaded.factors.values())
