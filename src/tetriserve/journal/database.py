"""Rows in SQLite: what is committed is on disk, and of a damaged file all is read that can be."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from tetriserve.journal.records import Row

RowName = tuple[str, str]
"""kind, name"""

_BUSY_S = 5.0
_HOST_CODES = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM
}  # fmt: skip
"""What can be wrong with the machine while the file is sound."""


DatabaseErrors = (sqlite3.Error, UnicodeDecodeError)
"""What every method of `Database` may raise: messages of sqlite3 quote damaged text, which it then cannot decode."""


class Database:
    """Used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite gives its other files the same mode
        self._connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            self._connection.text_factory = _text
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")  # a commit is on disk when it returns
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS records (kind TEXT, name TEXT, payload BLOB, checksum BLOB, "
                "PRIMARY KEY (kind, name)) WITHOUT ROWID"
            )
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
            sqlite3.DatabaseError: the file is damaged.
        """
        (verdict,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(str(verdict).splitlines()[-1])

    def get(self, kind: str, name: str) -> tuple[object, ...] | None:
        query = "SELECT kind, name, payload, checksum FROM records WHERE kind = ? AND name = ?"
        row: tuple[object, ...] | None = self._connection.execute(query, (kind, name)).fetchone()
        return row

    def apply(self, changes: Iterable[Row | RowName]) -> None:
        """Put rows, and drop those that only a name is given of, in this order. All of it lasts, or nothing."""
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            for change in changes:
                if len(change) == 2:
                    connection.execute("DELETE FROM records WHERE kind = ? AND name = ?", change)
                else:
                    connection.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", change)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def shorten_log(self) -> None:
        """Take the write-ahead log into the database, so that it does not grow for ever."""
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        self._connection.close()


def read_database(path: Path) -> tuple[list[tuple[object, ...]], str | None]:
    """Every row that can be read, and what is wrong with the file; None if it is sound, or new.

    Raises:
        sqlite3.Error, OSError: it is not the file that is at fault, but the disk or the memory.
    """
    rows: list[tuple[object, ...]] = []
    try:
        with closing(Database(path)) as database:
            database.read_into(rows)
            database.check()
    except UnicodeDecodeError:
        return rows, "its tables are not readable"
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _HOST_CODES:
            raise
        return rows, str(error)
    return rows, None


def set_aside(path: Path) -> Path:
    """Rename the database and its log; the name under which it is kept."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
    for suffix in ("-wal", "-shm"):
        if (beside := path.with_name(path.name + suffix)).exists():
            beside.rename(aside.with_name(aside.name + suffix))
    return aside


def _text(data: bytes) -> str:
    """Damaged text must not end the reading: no checksum fits it."""
    return data.decode(errors="replace")
