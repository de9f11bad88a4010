"""The journal gives back what it was given, to one owner at a time, and nothing that is not as it was written."""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.states import MemoryStates
from tetriserve.core.errors import ConfigError, JournalError
from tetriserve.core.events import Checkpoint, FailureKind, Run, TensorRef
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DENOISE, ENCODE, INPUT, image_stages
from tetriserve.journal import Entry, Failure, Journal, Kept, Key, Model
from tetriserve.journal.database import Database
from tetriserve.workload.outcome import Outcome, Status

MODEL = Model("tiny", "0123")
STATE = {"a.encode.0.0": b"embeddings", "a.denoise.2.1": b"after two steps", "a.denoise.5.2": b"after five"}
EMBEDS = TensorRef("a.encode.0.0", 10)
TASKS = {2: 1, 3: 2, 5: 2}
"""Which task left the latents, by steps done."""
PIXELS = bytes(range(12))


def make_request(request_id: str = "a", prompt: str = "a lighthouse") -> Request:
    return Request(
        request_id=request_id, prompt=prompt, shape=Shape(2, 2), stages=image_stages(8), seed=2**63 - 1, arrival_s=0.0,
        deadline_s=3.5,
    )  # fmt: skip


def make_entry(*requests: Request, name: str = "k", arrived_at: float = 1000.0) -> Entry:
    return Entry(
        key=Key("tenant", name), digest="d", model="tiny", fingerprint="0123", arrived_at=arrived_at,
        requests=requests or (make_request(),),
    )  # fmt: skip


def make_outcome(request: Request) -> Outcome:
    runs = (Run(Task((request.request_id,), DENOISE, (0, 1), 8), 0.1, 0.3),)
    return Outcome(request=request, status=Status.FINISHED, runs=runs, predicted_finish_s=0.2, finish_s=0.4)


def checkpoint(steps_done: int) -> Checkpoint:
    states = {ENCODE: EMBEDS}
    if steps_done:
        states[DENOISE] = TensorRef(f"a.denoise.{steps_done}.{TASKS[steps_done]}", 20)
    return Checkpoint(1, steps_done, states, (Run(Task(("a",), ENCODE, (1,)), 0.0, 0.1),))


def store() -> MemoryStates:
    return MemoryStates(STATE)


def wait(future: Future[Any]) -> Any:
    return future.result(10)


def settle(journal: Journal) -> None:
    """Until what is not urgent is done too."""
    while journal.num_waiting:
        time.sleep(0.001)


@pytest.fixture
def reopen(tmp_path: Path) -> Iterator[Callable[[], Journal]]:
    """The journal of `tmp_path`, closed before it is opened again."""
    opened: list[Journal] = []

    def reopen() -> Journal:
        for journal in opened:
            journal.close()
        opened.append(Journal(tmp_path / "j", MODEL))
        return opened[-1]

    yield reopen
    for journal in opened:
        journal.close()


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "j" / "tensors").iterdir())


def test_an_accepted_entry_is_there_after_a_restart_unfinished(reopen: Callable[[], Journal]) -> None:
    entry = make_entry(make_request("a", "Ünïcödé \x00"), make_request("b"))
    wait(reopen().accept(entry))
    (kept,) = reopen().take_loaded()
    assert kept == Kept(entry=entry)
    assert kept.ended_at is None


def test_the_newest_checkpoint_comes_back_and_the_one_before_is_gone(
    reopen: Callable[[], Journal], tmp_path: Path
) -> None:
    journal = reopen()
    wait(journal.accept(make_entry()))
    for steps_done in (0, 2, 5):
        journal.advance("a", 0, checkpoint(steps_done), store())
        settle(journal)
    assert files(tmp_path) == ["a.denoise.5.2", "a.encode.0.0"]

    journal = reopen()
    (kept,) = journal.take_loaded()
    taken = MemoryStates()
    restored = wait(journal.restore(kept.courses["a"], taken))
    states = {ENCODE: TensorRef("a.encode.0.0", 10), DENOISE: TensorRef("a.denoise.5.2", 10)}
    assert restored == Checkpoint(1, 5, states, checkpoint(5).runs)
    assert taken.bundles == {"a.encode.0.0": b"embeddings", "a.denoise.5.2": b"after five"}


def test_of_notes_that_wait_only_the_newest_is_written(reopen: Callable[[], Journal], tmp_path: Path) -> None:
    journal = reopen()
    wait(journal.accept(make_entry()))
    with journal._writer._wake:  # the writer cannot look meanwhile
        journal.advance("a", 0, checkpoint(2), store())
        journal.advance("a", 0, checkpoint(5), store())
        assert len(journal._writer._late) == 1
    settle(journal)
    assert files(tmp_path) == ["a.denoise.5.2", "a.encode.0.0"]


def test_a_checkpoint_that_vanished_before_it_was_copied_leaves_the_one_before(reopen: Callable[[], Journal]) -> None:
    journal = reopen()
    wait(journal.accept(make_entry()))
    journal.advance("a", 0, checkpoint(2), store())
    settle(journal)
    journal.advance("a", 1, checkpoint(3), store())
    settle(journal)
    (kept,) = reopen().take_loaded()
    course = kept.courses["a"]
    assert (course.stage_index, course.stage_steps_done, course.num_starts) == (1, 2, 1)
    assert {stage: kept.key for stage, kept in course.states.items()} == {ENCODE: EMBEDS.key, DENOISE: "a.denoise.2.1"}


def test_nothing_is_noted_of_a_request_that_has_ended(reopen: Callable[[], Journal], tmp_path: Path) -> None:
    journal = reopen()
    wait(journal.accept(make_entry()))
    wait(journal.keep_picture(make_outcome(make_request()), (2, 2, 3), PIXELS, 1004.0))
    journal.advance("a", 0, checkpoint(5), store())
    settle(journal)
    assert files(tmp_path) == ["a.pixels"]


def test_a_finished_image_replaces_its_checkpoints_and_comes_back_as_it_was(
    reopen: Callable[[], Journal], tmp_path: Path
) -> None:
    journal = reopen()
    wait(journal.accept(make_entry()))
    journal.advance("a", 0, checkpoint(2), store())
    settle(journal)
    wait(journal.keep_picture(make_outcome(make_request()), (2, 2, 3), PIXELS, 1004.0))
    assert files(tmp_path) == ["a.pixels"]
    journal = reopen()
    (kept,) = journal.take_loaded()
    assert kept.ended_at == 1004.0
    assert kept.courses == {}
    picture = kept.outputs["a"]
    assert (picture.outcome, picture.shape) == (make_outcome(make_request()), (2, 2, 3))
    assert wait(journal.read_pixels(picture)) == PIXELS
    assert wait(journal.read("a")) == kept


def test_a_finished_video_is_two_files_that_are_read_from_the_disk(
    reopen: Callable[[], Journal], tmp_path: Path
) -> None:
    journal = reopen()
    wait(journal.accept(make_entry()))
    journal.advance("a", 0, checkpoint(2), store())
    settle(journal)
    kept = wait(journal.keep_video(make_outcome(make_request()), b"a video" * 300_000, b"a thumbnail", 1004.0))
    assert files(tmp_path) == ["a.jpg", "a.mp4"]
    journal = reopen()
    (loaded,) = journal.take_loaded()
    assert (loaded.outputs, loaded.ended_at, loaded.courses) == ({"a": kept}, 1004.0, {})
    with journal.open(kept.video) as video, journal.open(kept.thumbnail) as thumbnail:
        assert (video.read(), thumbnail.read()) == (b"a video" * 300_000, b"a thumbnail")
    path = journal.path_of(kept.video)
    path.write_bytes(b"a Video" + path.read_bytes()[7:])
    assert journal.open(kept.video) is None
    path.unlink()
    assert journal.open(kept.video) is None
    assert journal.corrupt["file"] == 2
    wait(journal.drop("a"))
    assert files(tmp_path) == []


def test_files_of_a_video_that_nothing_refers_to_are_removed_at_the_start(
    reopen: Callable[[], Journal], tmp_path: Path
) -> None:
    reopen()
    folder = tmp_path / "j" / "tensors"
    for name in ("a.mp4", "a.jpg.tmp", "my.mp4.txt", "notes.txt"):
        (folder / name).write_bytes(b"x")
    reopen()
    assert files(tmp_path) == ["my.mp4.txt", "notes.txt"]


def test_an_entry_of_two_images_has_ended_when_both_are_there(reopen: Callable[[], Journal]) -> None:
    journal = reopen()
    entry = make_entry(make_request("a"), make_request("b"))
    wait(journal.accept(entry))
    wait(journal.keep_picture(make_outcome(entry.requests[1]), (2, 2, 3), PIXELS, 1004.0))
    assert wait(journal.read("a")).ended_at is None
    wait(journal.keep_picture(make_outcome(entry.requests[0]), (2, 2, 3), PIXELS, 1003.0))
    assert wait(journal.read("a")).ended_at == 1004.0


def test_a_failure_takes_the_place_of_all_else(reopen: Callable[[], Journal], tmp_path: Path) -> None:
    journal = reopen()
    entry = make_entry(make_request("a"), make_request("b"))
    wait(journal.accept(entry))
    wait(journal.keep_picture(make_outcome(entry.requests[1]), (2, 2, 3), PIXELS, 1004.0))
    failure = Failure(entry="a", failed_at=1005.0, message="latents are not finite", kind=FailureKind.STEP)
    wait(journal.fail(failure))
    assert files(tmp_path) == []
    (kept,) = reopen().take_loaded()
    assert kept == Kept(entry=entry, failure=failure)
    assert kept.ended_at == 1005.0


def test_a_dropped_entry_leaves_nothing(reopen: Callable[[], Journal], tmp_path: Path) -> None:
    journal = reopen()
    wait(journal.accept(make_entry()))
    journal.advance("a", 0, checkpoint(2), store())
    settle(journal)
    wait(journal.drop("a"))
    assert files(tmp_path) == []
    assert reopen().take_loaded() == []


def test_dropping_follows_accepting_even_in_one_transaction(reopen: Callable[[], Journal]) -> None:
    journal = reopen()
    with journal._writer._wake:
        accepted, dropped = journal.accept(make_entry()), journal.drop("a")
    wait(accepted), wait(dropped)
    assert reopen().take_loaded() == []


def test_entries_come_in_order_of_arrival(reopen: Callable[[], Journal]) -> None:
    journal = reopen()
    for request_id, arrived_at in (("b", 3.0), ("a", 2.0), ("c", 1.0)):
        wait(journal.accept(make_entry(make_request(request_id), name=request_id, arrived_at=arrived_at)))
    assert [kept.entry.name for kept in reopen().take_loaded()] == ["c", "a", "b"]


def test_two_servers_cannot_have_one_journal(reopen: Callable[[], Journal], tmp_path: Path) -> None:
    reopen()
    with pytest.raises(ConfigError, match=r"journal .*/j is in use by another server; name another directory"):
        Journal(tmp_path / "j", MODEL)
    reopen()


@pytest.mark.parametrize("path", ["/proc/nothing", "/dev/null/below"])
def test_a_directory_that_cannot_be_is_one_line(path: str) -> None:
    with pytest.raises(ConfigError, match=rf"journal {path} cannot be written: .*; name another directory"):
        Journal(Path(path), MODEL)


def test_a_journal_of_another_model_is_left_as_it_is(reopen: Callable[[], Journal], tmp_path: Path) -> None:
    journal = reopen()
    wait(journal.accept(make_entry()))
    journal.close()
    with pytest.raises(ConfigError, match=r"holds work of model 'tiny' \(0123\), not of 'big' \(4567\)"):
        Journal(tmp_path / "j", Model("big", "4567"))
    assert len(reopen().take_loaded()) == 1


def test_an_empty_journal_serves_any_model(reopen: Callable[[], Journal], tmp_path: Path) -> None:
    reopen().close()
    Journal(tmp_path / "j", Model("big", "4567")).close()


def test_only_its_user_can_read_it(reopen: Callable[[], Journal], tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        journal = reopen()
        wait(journal.accept(make_entry()))
        journal.advance("a", 0, checkpoint(2), store())
        settle(journal)
    finally:
        os.umask(before)
    for path in (tmp_path / "j").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert stat.S_IMODE((tmp_path / "j").stat().st_mode) == 0o700


def test_what_a_killed_server_left_is_removed_and_an_operators_files_are_not(
    reopen: Callable[[], Journal], tmp_path: Path
) -> None:
    journal = reopen()
    wait(journal.accept(make_entry()))
    journal.advance("a", 0, checkpoint(2), store())
    settle(journal)
    journal.close()
    earlier = ("a.embeds", "a.latents.3")
    for name in (*earlier, "b.pixels", "a.denoise.3.4", "a.denoise.4.5.tmp", "notes.txt", "notes.3.txt"):
        (tmp_path / "j" / "tensors" / name).write_text("left")
    (tmp_path / "j" / "README").write_text("mine")
    reopen()
    assert files(tmp_path) == ["a.denoise.2.1", "a.encode.0.0", "notes.3.txt", "notes.txt"]
    assert (tmp_path / "j" / "README").exists()


def test_the_log_is_taken_into_the_database(reopen: Callable[[], Journal], tmp_path: Path) -> None:
    journal = reopen()
    for number in range(50):
        wait(journal.accept(make_entry(make_request(f"r{number}", "x" * 4000), name=str(number))))
    log = tmp_path / "j" / "journal.sqlite3-wal"
    assert log.stat().st_size > 0
    wait(journal.shorten_log())
    assert log.stat().st_size == 0


def test_a_failed_commit_keeps_nothing_and_says_so(
    reopen: Callable[[], Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = reopen()

    def full(changes: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(journal._database, "apply", full)
        with pytest.raises(JournalError, match="the journal cannot be used: database or disk is full"):
            wait(journal.accept(make_entry()))
    assert journal.num_errors == 1
    wait(journal.accept(make_entry(make_request("b"))))
    assert [kept.entry.name for kept in reopen().take_loaded()] == ["b"]


def test_a_full_disk_at_the_start_is_no_damage(
    reopen: Callable[[], Journal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = reopen()
    wait(journal.accept(make_entry()))
    journal.close()

    def full(database: Database, rows: object) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Database, "read_into", full)
        with pytest.raises(ConfigError, match="cannot be opened: database or disk is full"):
            Journal(tmp_path / "j", MODEL)
    assert len(reopen().take_loaded()) == 1


def test_after_closing_nothing_is_accepted(reopen: Callable[[], Journal]) -> None:
    journal = reopen()
    journal.close()
    journal.close()
    with pytest.raises(JournalError, match="closed"):
        wait(journal.accept(make_entry()))


BROUGHT = TensorRef("a.input.0", 8)
BEGIN = Checkpoint(0, 0, {INPUT: BROUGHT}, ())


def test_what_a_request_brings_along_is_kept_when_it_is_accepted(reopen: Callable[[], Journal], tmp_path: Path) -> None:
    entry = make_entry(make_request("a"), make_request("b"))
    pictures = MemoryStates({"a.input.0": b"pictures"})
    wait(reopen().accept(entry, {"a": BEGIN, "b": None}, pictures))
    assert files(tmp_path) == ["a.input.0"]
    journal = reopen()
    (kept,) = journal.take_loaded()
    assert kept.courses.keys() == {"a"}
    taken = MemoryStates()
    assert wait(journal.restore(kept.courses["a"], taken)) == BEGIN
    assert taken.bundles == pictures.bundles
    wait(journal.drop(entry.name))
    assert files(tmp_path) == []


def test_an_entry_whose_pictures_are_gone_from_the_store_is_not_accepted(reopen: Callable[[], Journal]) -> None:
    journal = reopen()
    with pytest.raises(JournalError):
        wait(journal.accept(make_entry(), {"a": BEGIN}, MemoryStates()))
    assert reopen().take_loaded() == []


@pytest.mark.parametrize(("spoilt", "is_left"), [("a.input.0", False), ("a.encode.0.0", True), ("a.denoise.2.1", True)])
def test_what_was_brought_along_outlives_the_loss_of_other_state(
    reopen: Callable[[], Journal], tmp_path: Path, spoilt: str, is_left: bool
) -> None:
    states = MemoryStates({**STATE, "a.input.0": b"pictures"})
    journal = reopen()
    wait(journal.accept(make_entry(), {"a": BEGIN}, states))
    later = checkpoint(2)
    journal.advance("a", 0, replace(later, states={INPUT: BROUGHT, **later.states}), states)
    settle(journal)
    path = tmp_path / "j" / "tensors" / spoilt
    path.write_bytes(bytes(len(path.read_bytes())))
    journal = reopen()
    (kept,) = journal.take_loaded()
    taken = MemoryStates()
    assert wait(journal.restore(kept.courses["a"], taken)) == (BEGIN if is_left else None)
    assert taken.bundles == ({"a.input.0": b"pictures"} if is_left else {})
    assert files(tmp_path) == (["a.input.0"] if is_left else [])
    (again,) = reopen().take_loaded()
    assert again.courses["a"].states.keys() == ({INPUT} if is_left else set())
