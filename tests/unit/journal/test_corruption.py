"""Whatever happens to the bytes on disk: the journal opens, and what it gives back is what was written, or nothing."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.states import MemoryStates
from tetriserve.journal import Failure, Journal, Kept, Model

from .test_journal import (
    MODEL,
    PIXELS,
    checkpoint,
    make_entry,
    make_outcome,
    make_request,
    settle,
    store,
    wait,
)

DATABASE = "journal.sqlite3"
searching = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Kept]]:
    """A journal with an entry of each kind, and what is in it."""
    path = tmp_path_factory.mktemp("written") / "j"
    journal = Journal(path, MODEL)
    for name in "abcd":
        wait(journal.accept(make_entry(make_request(name, f"picture of {name} " * 40), name=name)))
    journal.advance("a", 0, checkpoint(5), store())
    settle(journal)
    for name in "bc":
        wait(journal.keep_picture(make_outcome(make_request(name)), (2, 2, 3), PIXELS, 1004.0))
    wait(journal.fail(Failure(entry="d", failed_at=1.0, message="no")))
    journal.close()
    journal = Journal(path, MODEL)
    kept = {one.entry.name: one for one in journal.take_loaded()}
    journal.close()
    assert sorted(kept) == ["a", "b", "c", "d"]
    return path, kept


def check(path: Path, expected: dict[str, Kept]) -> Journal:
    """Open what was damaged: all that comes back is true, and it can be worked with."""
    journal = Journal(path, MODEL)
    try:
        for kept in journal.take_loaded():
            truth = expected[kept.entry.name]
            assert kept.entry == truth.entry
            assert kept.courses.items() <= truth.courses.items()
            assert kept.outputs.items() <= truth.outputs.items()
            assert kept.failure in (None, truth.failure)
            for picture in kept.outputs.values():
                assert wait(journal.read_pixels(picture)) in (None, PIXELS)
            for course in kept.courses.values():
                found = MemoryStates()
                restored = wait(journal.restore(course, found))
                if restored is not None:
                    assert (restored.stage_index, restored.stage_steps_done) == (1, 5)
                    assert found.bundles == {"a.encode.0.0": b"embeddings", "a.denoise.5.2": b"after five"}
        wait(journal.accept(make_entry(make_request("new"), name="new")))
        assert wait(journal.read("new")).entry.name == "new"
    finally:
        journal.close()
    again = Journal(path, MODEL)
    try:
        assert not again.corrupt, "what is damaged is found once"
        assert "new" in {kept.entry.name for kept in again.take_loaded()}
    finally:
        again.close()
    return journal


def copied(written: Path, tmp_path: Path) -> Path:
    path = tmp_path / "j"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(written, path)
    return path


flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=20)


@searching
@given(flips=flips)
def test_flipped_bytes_of_the_database(
    written: tuple[Path, dict[str, Kept]], tmp_path: Path, flips: list[tuple[float, int]]
) -> None:
    path = copied(written[0], tmp_path)
    data = bytearray((path / DATABASE).read_bytes())
    for position, mask in flips:
        data[int(position * len(data))] ^= mask
    (path / DATABASE).write_bytes(data)
    check(path, written[1])


@searching
@given(share=st.floats(0, 1), tail=st.binary(max_size=64))
@example(share=0.0, tail=b"")
@example(share=0.0, tail=b"not a database, but long enough to be taken for one at first sight")
def test_a_truncated_database(written: tuple[Path, dict[str, Kept]], tmp_path: Path, share: float, tail: bytes) -> None:
    path = copied(written[0], tmp_path)
    data = (path / DATABASE).read_bytes()
    (path / DATABASE).write_bytes(data[: int(share * len(data))] + tail)
    check(path, written[1])


@searching
@given(log=st.binary(max_size=4096), index=st.binary(max_size=64))
def test_a_log_of_garbage(written: tuple[Path, dict[str, Kept]], tmp_path: Path, log: bytes, index: bytes) -> None:
    path = copied(written[0], tmp_path)
    (path / f"{DATABASE}-wal").write_bytes(log)
    (path / f"{DATABASE}-shm").write_bytes(index)
    check(path, written[1])


@searching
@given(name=st.sampled_from(["a.encode.0.0", "a.denoise.5.2", "b.pixels"]), data=st.binary(max_size=32))
def test_other_bytes_in_a_file(written: tuple[Path, dict[str, Kept]], tmp_path: Path, name: str, data: bytes) -> None:
    path = copied(written[0], tmp_path)
    (path / "tensors" / name).write_bytes(data)
    check(path, written[1])


@pytest.mark.parametrize("name", ["a.encode.0.0", "a.denoise.5.2", "b.pixels"])
def test_a_missing_file(written: tuple[Path, dict[str, Kept]], tmp_path: Path, name: str) -> None:
    path = copied(written[0], tmp_path)
    (path / "tensors" / name).unlink()
    assert check(path, written[1]).corrupt == {"file": 1}


@searching
@given(
    kind=st.sampled_from(["entry", "course", "picture", "failure", "other"]),
    name=st.sampled_from(["a", "b", "c", "d", "nobody"]),
    value=st.none() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=9) | st.binary(max_size=40),
    column=st.sampled_from(["payload", "checksum", "name", "kind"]),
)
def test_another_value_in_a_row(
    written: tuple[Path, dict[str, Kept]], tmp_path: Path, kind: str, name: str, value: object, column: str
) -> None:
    path = copied(written[0], tmp_path)
    with sqlite3.connect(path / DATABASE) as connection:
        connection.execute(
            f"UPDATE OR IGNORE records SET {column} = ? WHERE kind = ? AND name = ?", (value, kind, name)
        )
    connection.close()
    check(path, written[1])


def test_a_payload_under_anothers_name_is_noticed(written: tuple[Path, dict[str, Kept]], tmp_path: Path) -> None:
    path = copied(written[0], tmp_path)
    with sqlite3.connect(path / DATABASE) as connection:
        (row,) = connection.execute("SELECT payload, checksum FROM records WHERE kind = 'picture' AND name = 'b'")
        connection.execute("UPDATE records SET payload = ?, checksum = ? WHERE kind = 'picture' AND name = 'c'", row)
    connection.close()
    journal = check(path, written[1])
    assert journal.corrupt == {"record": 1}


def test_a_damaged_database_is_set_aside_under_another_name_and_what_is_sound_of_it_lives_on(
    written: tuple[Path, dict[str, Kept]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = copied(written[0], tmp_path)
    with sqlite3.connect(path / DATABASE) as connection:
        connection.execute("UPDATE records SET checksum = x'00' WHERE kind = 'entry' AND name = 'a'")
    connection.close()
    before = (path / DATABASE).read_bytes()
    journal = Journal(path, MODEL)
    assert [kept.entry.name for kept in journal.take_loaded()] == ["b", "c", "d"]
    journal.close()
    assert (path / f"{DATABASE}.damaged-1").read_bytes() == before
    assert "journal.sqlite3.damaged-1 keeps it" in caplog.text
    assert "picture of" not in caplog.text


def test_tables_whose_names_are_no_text_any_more(written: tuple[Path, dict[str, Kept]], tmp_path: Path) -> None:
    """sqlite3 quotes them in its message, and fails to decode it."""
    path = copied(written[0], tmp_path)
    data = (path / DATABASE).read_bytes()
    (path / DATABASE).write_bytes(data.replace(b"CREATE TABLE records", b"CREATE \xa0\xff\xfeLE records"))
    assert check(path, written[1]).corrupt == {"database": 1}


def test_a_file_that_is_no_database_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / DATABASE).write_text("a shopping list\n" * 1000)
    journal = Journal(tmp_path / "j", Model("any", "1"))
    assert journal.take_loaded() == []
    assert journal.corrupt == {"database": 1}
    journal.close()
    assert (tmp_path / "j" / f"{DATABASE}.damaged-1").read_text().startswith("a shopping list")
    assert "file is not a database" in caplog.text


def test_records_of_another_version_are_not_guessed_at(tmp_path: Path) -> None:
    from tetriserve.journal.records import Corrupt, _seal, record_of, row_of

    entry = make_entry()
    assert record_of(row_of(entry)) == entry
    for payload in (b"{}", b"[]", b"\xff", b'{"request_id": 1}'):
        with pytest.raises(Corrupt, match="cannot be read"):
            record_of(("entry", "a", payload, _seal("entry", "a", payload)))
