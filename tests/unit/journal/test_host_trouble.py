"""A full disk, a lost log, a second server: the journal opens if it is sound, and loses nothing without a count."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tetriserve.core.errors import ConfigError, JournalError
from tetriserve.journal import Journal
from tetriserve.journal.database import NUM_COMMITS, Database, read_database, replace_database
from tetriserve.journal.records import row_of
from tetriserve.journal.writer import reason

from .test_journal import MODEL, make_entry, make_request, wait

DATABASE = "journal.sqlite3"
NUM_ENTRIES = 5


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A journal as a killed server leaves it: its entries are in the write-ahead log alone."""
    path = tmp_path_factory.mktemp("crashed")
    journal = Journal(path / "living", MODEL)
    for number in range(NUM_ENTRIES):
        wait(journal.accept(make_entry(make_request(f"r{number}"), name=str(number))))
    shutil.copytree(path / "living", path / "j")
    journal.close()
    yield path / "j"


def copied(crashed: Path, tmp_path: Path) -> Path:
    path = tmp_path / "j"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(crashed, path)
    return path


def opened(path: Path) -> tuple[int, dict[str, int]]:
    """How many entries a journal gives back, and what it found corrupt."""
    journal = Journal(path, MODEL)
    try:
        return len(journal.take_loaded()), dict(journal.corrupt)
    finally:
        journal.close()


def test_a_log_that_is_whole_gives_back_all_and_nothing_is_counted(crashed: Path, tmp_path: Path) -> None:
    path = copied(crashed, tmp_path)
    assert (path / f"{DATABASE}-wal").stat().st_size > 0
    assert opened(path) == (NUM_ENTRIES, {})
    assert opened(path) == (NUM_ENTRIES, {})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_damaged_log_loses_nothing_without_a_count(crashed: Path, tmp_path: Path, position: float, mask: int) -> None:
    path = copied(crashed, tmp_path)
    log = path / f"{DATABASE}-wal"
    data = bytearray(log.read_bytes())
    data[int(position * len(data))] ^= mask
    log.write_bytes(data)
    num_loaded, corrupt = opened(path)
    num_lost = NUM_ENTRIES - num_loaded
    assert corrupt == ({"commit": num_lost} if num_lost else {})
    assert opened(path) == (num_loaded, {}), "what is lost is counted once"


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_a_truncated_log_is_counted(
    crashed: Path, tmp_path: Path, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    path = copied(crashed, tmp_path)
    log = path / f"{DATABASE}-wal"
    log.write_bytes(log.read_bytes()[: int(share * log.stat().st_size)])
    num_loaded, corrupt = opened(path)
    assert num_loaded < NUM_ENTRIES
    assert corrupt == {"commit": NUM_ENTRIES - num_loaded}
    assert f"the journal has lost its last {NUM_ENTRIES - num_loaded} commits" in caplog.text


def test_a_database_that_is_gone_is_counted(crashed: Path, tmp_path: Path) -> None:
    path = copied(crashed, tmp_path)
    for file in path.glob(f"{DATABASE}*"):
        file.unlink()
    assert opened(path) == (0, {"commit": NUM_ENTRIES})


@pytest.mark.parametrize("noted", [None, b"", b"a number", b"\xff" * 30, b"00000000000000000003"])
def test_a_note_that_is_gone_or_too_small_proves_nothing(crashed: Path, tmp_path: Path, noted: bytes | None) -> None:
    path = copied(crashed, tmp_path)
    (path / "commits").unlink()
    if noted is not None:
        (path / "commits").write_bytes(noted)
    assert opened(path) == (NUM_ENTRIES, {})


def test_commits_are_counted_past_the_largest_number(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", MODEL)
    journal._database.begin([], NUM_COMMITS - 2)
    for number in range(3):
        wait(journal.accept(make_entry(make_request(f"r{number}"), name=str(number))))
    assert journal._database.num_commits == 1
    assert journal._directory.read_commits() == 1
    journal.close()
    assert opened(tmp_path / "j") == (3, {})


def test_the_database_itself_is_locked(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", MODEL)
    wait(journal.accept(make_entry()))
    for file in (tmp_path / "j").iterdir():
        if file.is_file() and not file.name.startswith(DATABASE):
            file.unlink()
    with pytest.raises(ConfigError, match="in use by another server"):
        Journal(tmp_path / "j", MODEL)
    other = sqlite3.connect(tmp_path / "j" / DATABASE, timeout=0)
    with pytest.raises(sqlite3.OperationalError, match="database is locked"):
        other.execute("SELECT * FROM records")
    other.close()
    wait(journal.accept(make_entry(make_request("b"), name="b")))
    journal.close()
    assert opened(tmp_path / "j") == (2, {})


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from tests.unit.journal.test_journal import MODEL, make_entry, make_request, wait
from tetriserve.core.errors import ConfigError, JournalError
from tetriserve.journal import Journal

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))  # no byte can be written to any file
path = Path(sys.argv[1])
try:
    journal = Journal(path, MODEL)
except ConfigError as error:
    print(error)
    sys.exit(2)
print("loaded", len(journal.take_loaded()))
for work in (
    lambda: journal.accept(make_entry(make_request("new"), name="new")),
    lambda: journal._writer.submit(lambda batch: journal._directory.write("new.pixels", b"12")),
):
    try:
        wait(work())
    except JournalError as error:
        print(error)
print("files", sorted(file.name for file in (path / "tensors").iterdir()))
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
wait(journal.accept(make_entry(make_request("new"), name="new")))
journal.close()
"""


def on_a_full_disk(path: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[3]
    return subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, cwd=root, check=False
    )


@pytest.mark.parametrize("how", ["crashed", "stopped"])
def test_a_journal_opens_on_a_full_disk_and_takes_work_again_when_there_is_room(
    crashed: Path, tmp_path: Path, how: str
) -> None:
    path = copied(crashed, tmp_path)
    if how == "stopped":
        opened(path)
        assert not (path / f"{DATABASE}-wal").exists()
    done = on_a_full_disk(path)
    assert done.returncode == 0, done.stderr
    loaded, refused, half, files = done.stdout.splitlines()
    assert loaded == f"loaded {NUM_ENTRIES}"
    assert refused.startswith("the journal cannot be used: ")
    assert half == "the journal cannot be used: File too large"
    assert files == "files []", "no half file takes what room is left"
    assert opened(path) == (NUM_ENTRIES + 1, {})


def test_a_damaged_journal_on_a_full_disk_is_left_as_it_is(crashed: Path, tmp_path: Path) -> None:
    path = copied(crashed, tmp_path)
    opened(path)
    with sqlite3.connect(path / DATABASE) as connection:
        connection.execute("UPDATE records SET checksum = x'00' WHERE name = 'r0'")
    connection.close()
    before = (path / DATABASE).read_bytes()
    done = on_a_full_disk(path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"journal {path} cannot be opened: ")
    assert line.endswith("; make room, or name another directory")
    assert (path / DATABASE).read_bytes() == before
    assert not list(path.glob("*.damaged-*"))
    assert opened(path) == (NUM_ENTRIES - 1, {"record": 1})


def test_what_the_host_refuses_is_no_damage(crashed: Path, tmp_path: Path) -> None:
    """Here SQLite cannot open its log. No descriptors left looks the same."""
    path = copied(crashed, tmp_path)
    opened(path)
    (path / f"{DATABASE}-wal").mkdir()
    with pytest.raises(ConfigError, match="cannot be opened: unable to open database file; make room"):
        Journal(path, MODEL)
    (path / f"{DATABASE}-wal").rmdir()
    assert opened(path) == (NUM_ENTRIES, {})


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE records ADD COLUMN note TEXT",
        "CREATE TRIGGER t BEFORE INSERT ON records BEGIN SELECT RAISE(ABORT, 'no'); END",
        "CREATE TABLE other (name TEXT)",
        "CREATE TABLE copy AS SELECT * FROM records; DROP TABLE records; ALTER TABLE copy RENAME TO records",
    ],
)
def test_tables_that_cannot_be_written_as_ours_are_found_at_the_start(
    crashed: Path, tmp_path: Path, change: str
) -> None:
    path = copied(crashed, tmp_path)
    opened(path)
    connection = sqlite3.connect(path / DATABASE)
    connection.executescript(change)
    connection.close()
    journal = Journal(path, MODEL)
    assert len(journal.take_loaded()) == NUM_ENTRIES
    assert journal.corrupt == {"database": 1}
    wait(journal.accept(make_entry(make_request("new"), name="new")))
    journal.close()
    assert (path / f"{DATABASE}.damaged-1").exists()
    assert opened(path) == (NUM_ENTRIES + 1, {})


def test_a_header_that_forbids_writing_is_damage(crashed: Path, tmp_path: Path) -> None:
    path = copied(crashed, tmp_path)
    opened(path)
    data = bytearray((path / DATABASE).read_bytes())
    data[18] = 7  # the version of the format that writers must know
    (path / DATABASE).write_bytes(data)
    assert opened(path) == (NUM_ENTRIES, {"database": 1})
    assert opened(path) == (NUM_ENTRIES, {})


@pytest.mark.parametrize("stage", ["before the renames", "between the renames"])
def test_a_server_killed_while_it_replaces_the_database_loses_nothing(tmp_path: Path, stage: str) -> None:
    path = tmp_path / DATABASE
    rows = [row_of(make_entry(make_request(name), name=name)) for name in "abc"]
    database = Database(path)
    database.begin(rows, 7)
    database.close()
    replacement = tmp_path / f"{DATABASE}.new"
    if stage == "before the renames":
        replacement.write_bytes(b"half of it")
    else:
        path.rename(replacement)
    content = read_database(path)
    assert (len(content.rows), content.num_commits, content.damage) == (3, 7, None)
    aside = replace_database(path, rows[:2], 8)
    assert aside.name == f"{DATABASE}.damaged-1"
    content = read_database(path)
    assert (len(content.rows), content.num_commits, content.damage) == (2, 8, None)
    assert not replacement.exists()


def test_clients_are_told_of_an_error_without_its_path(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", MODEL)
    (tmp_path / "j" / "tensors").rmdir()
    with pytest.raises(JournalError) as caught:
        wait(journal._writer.submit(lambda batch: journal._directory.write("a.pixels", b"")))
    assert str(caught.value) == "the journal cannot be used: No such file or directory"
    assert reason(OSError(28, "No space left on device", "/dev/shm/x")) == "No space left on device"
    assert reason(ValueError("/secret/path")) == "ValueError"
    (tmp_path / "j" / "tensors").mkdir()
    journal.close()
