"""Rows in SQLite: what is committed is on disk, and of a damaged file all is read that can be."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tetriserve.journal.records import Row

RowName = tuple[str, str]
"""kind, name"""

NUM_COMMITS = 2**31
"""Commits are numbered modulo this, which SQLite has room for in its header."""

_BUSY_S = 5.0
_SCHEMA = (
    "CREATE TABLE records (kind TEXT, name TEXT, payload BLOB, checksum BLOB, PRIMARY KEY (kind, name)) WITHOUT ROWID"
)
_DAMAGE_CODES = {
    sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_SCHEMA, sqlite3.SQLITE_TOOBIG,
}  # fmt: skip
"""What a damaged file ends in; READONLY, though it was opened for writing, by its header. Any other code is the host's
(no room, no descriptors, no memory): then nothing is known about the file, and it is left as it is."""


DatabaseErrors = (sqlite3.Error, UnicodeDecodeError)
"""What every method of `Database` may raise: messages of sqlite3 quote damaged text, which it then cannot decode."""


class Database:
    """Used by one thread at a time, and locked against other processes while it is open.

    num_commits: how many there were, modulo `NUM_COMMITS`.
    """

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite gives its other files the same mode
        self._connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            self._connection.text_factory = _text
            # Without a `-shm` file, for which a full disk has no room: what is there can be read even then.
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")  # a commit is on disk when it returns
            self._connection.execute(_SCHEMA.replace("TABLE", "TABLE IF NOT EXISTS", 1))
            (self.num_commits,) = self._connection.execute("PRAGMA user_version").fetchone()
        except DatabaseErrors:
            self._connection.close()
            raise

    def read_into(self, rows: list[tuple[object, ...]]) -> None:
        """Append every row, so that those before a damaged page are there when it raises."""
        for row in self._connection.execute("SELECT kind, name, payload, checksum FROM records"):
            rows.append(row)

    def check(self) -> None:
        """
        Raises:
            sqlite3.DatabaseError: the file is damaged, or its tables are not those that `apply` writes.
        """
        (verdict,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(str(verdict).splitlines()[-1])
        if self._connection.execute("SELECT sql FROM sqlite_schema").fetchall() != [(_SCHEMA,)]:
            raise sqlite3.DatabaseError("its tables are of another version")
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute("PRAGMA user_version = 0")  # its header may say that it is read-only
        self._connection.execute("ROLLBACK")

    def get(self, kind: str, name: str) -> tuple[object, ...] | None:
        query = "SELECT kind, name, payload, checksum FROM records WHERE kind = ? AND name = ?"
        row: tuple[object, ...] | None = self._connection.execute(query, (kind, name)).fetchone()
        return row

    def apply(self, changes: Iterable[Row | RowName]) -> None:
        """Put rows, and drop those that only a name is given of, in this order. All of it lasts, or nothing."""
        self._apply(changes, (self.num_commits + 1) % NUM_COMMITS)

    def begin(self, rows: Iterable[Row], num_commits: int) -> None:
        """Fill a new database, which takes the place of one with so many commits."""
        self._apply(rows, num_commits)
        self.shorten_log()

    def shorten_log(self) -> None:
        """Take the write-ahead log into the database, so that it does not grow for ever."""
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        self._connection.close()

    def _apply(self, changes: Iterable[Row | RowName], num_commits: int) -> None:
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            for change in changes:
                if len(change) == 2:
                    connection.execute("DELETE FROM records WHERE kind = ? AND name = ?", change)
                else:
                    connection.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", change)
            connection.execute(f"PRAGMA user_version = {num_commits}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self.num_commits = num_commits


@dataclass
class Content:
    """What a file holds: all rows that can be read. damage: what is wrong with it; None if it is sound, or new.

    num_commits: as `Database` has it; None if that cannot be read.
    """

    rows: list[tuple[object, ...]] = field(default_factory=list)
    num_commits: int | None = None
    damage: str | None = None


def read_database(path: Path) -> Content:
    """
    Raises:
        sqlite3.Error, OSError: it is not the file that is at fault, but the disk, the memory or another process.
    """
    content = Content()
    if not path.exists() and _replacement(path).exists():  # `replace_database` was killed between its renames
        _replacement(path).rename(path)
    try:
        with closing(Database(path)) as database:
            content.num_commits = database.num_commits
            database.read_into(content.rows)
            database.check()
    except UnicodeDecodeError:
        content.damage = "its tables are not readable"
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF not in _DAMAGE_CODES:
            raise
        content.damage = str(error)
    return content


def replace_database(path: Path, rows: Iterable[Row], num_commits: int) -> Path:
    """Rename the database and its log, and begin a new one with `rows`; the name under which the old one is kept.

    The new one is whole before the old one is renamed: where there is no room for it, all stays as it was.
    """
    new = _replacement(path)
    _remove(new)  # what is left of an earlier attempt
    try:
        with closing(Database(new)) as database:
            database.begin(rows, num_commits)
    except BaseException:
        _remove(new)
        raise
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
    for suffix in ("-wal", "-shm"):
        if (beside := path.with_name(path.name + suffix)).exists():
            beside.rename(aside.with_name(aside.name + suffix))
    new.rename(path)
    return aside


def _replacement(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _text(data: bytes) -> str:
    """Damaged text must not end the reading: no checksum fits it."""
    return data.decode(errors="replace")
