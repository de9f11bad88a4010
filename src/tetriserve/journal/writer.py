"""The one thread that writes: what waits goes to disk in one transaction, and nobody's event loop waits for a disk."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tetriserve.core.errors import JournalError
from tetriserve.journal.database import Database, DatabaseErrors, RowName
from tetriserve.journal.directory import Directory
from tetriserve.journal.records import KeptFile, Record, Row, kind_of, row_of

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Batch:
    """What one piece of work changes: records, and files that nothing refers to once they are changed."""

    changes: list[Row | RowName] = field(default_factory=list)
    stale_files: list[str] = field(default_factory=list)

    def put(self, record: Record) -> None:
        self.changes.append(row_of(record))

    def drop(self, kind: type[Record], name: str) -> None:
        self.changes.append((kind_of(kind), name))

    def drop_files(self, files: Iterable[KeptFile]) -> None:
        self.stale_files += [file.name for file in files]


Work = Callable[[Batch], T]
"""Runs on the writer's thread; it may read and write files, and says in the batch what becomes of the rows."""


@dataclass
class _Job(Generic[T]):
    work: Work[T]
    done: Future[T] = field(default_factory=Future)


class Writer:
    """Results are there when they are on disk. `num_errors` counts work that failed."""

    def __init__(self, database: Database, directory: Directory) -> None:
        self._database = database
        self._directory = directory
        self._urgent: list[_Job[Any]] = []
        self._late: dict[str, _Job[Any]] = {}
        self._wake = threading.Condition()
        self._num_at_work = 0
        self._is_closing = False
        self.num_errors = 0
        self._thread = threading.Thread(target=self._run, name="tetriserve-journal", daemon=True)
        self._thread.start()

    def submit(self, work: Work[T]) -> Future[T]:
        """Do `work` next, in one transaction with what else waits.

        The future raises JournalError if it cannot be kept.
        """
        job = _Job(work)
        with self._wake:
            if self._is_closing:
                job.done.set_exception(JournalError("the journal is closed"))
            else:
                self._urgent.append(job)
                self._wake.notify()
        return job.done

    def submit_late(self, name: str, work: Work[None]) -> None:
        """Do `work` when nothing is urgent; it takes the place of what waits under the same name."""
        with self._wake:
            if not self._is_closing:
                self._late[name] = _Job(work)
                self._wake.notify()

    @property
    def num_waiting(self) -> int:
        """Pieces of work that are not on disk yet."""
        with self._wake:
            return len(self._urgent) + len(self._late) + self._num_at_work

    def close(self) -> None:
        """Finish what waits. Takes as long as the disk does."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._next_jobs():
            self._do(jobs)

    def _next_jobs(self) -> list[_Job[Any]]:
        """All that is urgent, and one that is not; nothing at the end."""
        with self._wake:
            self._num_at_work = 0
            while not (self._urgent or self._late or self._is_closing):
                self._wake.wait()
            jobs, self._urgent = self._urgent, []
            if not jobs and self._late:
                jobs = [self._late.pop(next(iter(self._late)))]
            self._num_at_work = len(jobs)
            return jobs

    def _do(self, jobs: list[_Job[Any]]) -> None:
        done: list[tuple[_Job[Any], Any, Batch]] = []
        for job in jobs:
            if not job.done.set_running_or_notify_cancel():
                continue  # nobody waits for it any more
            batch = Batch()
            try:
                done.append((job, job.work(batch), batch))
            except Exception as error:  # whatever it is, it is this one's alone, and its waiter is told
                self._fail(job, error)
        changes = [change for _, _, batch in done for change in batch.changes]
        if changes:
            try:
                self._database.apply(changes)
            except DatabaseErrors as error:
                for job, _, _ in done:
                    self._fail(job, error)
                return
            self._directory.note_commits(self._database.num_commits)
        for job, result, batch in done:
            for name in batch.stale_files:
                self._directory.remove(name)
            job.done.set_result(result)

    def _fail(self, job: _Job[Any], error: Exception) -> None:
        self.num_errors += 1
        logger.error("the journal failed: %s: %s", type(error).__name__, error)
        job.done.set_exception(
            error if isinstance(error, JournalError) else JournalError(f"the journal cannot be used: {reason(error)}")
        )


def reason(error: BaseException) -> str:
    """What clients may be told of an error: nothing that names a path."""
    match error:
        case OSError(strerror=str(text)):
            return text
        case sqlite3.Error():
            return str(error)
        case _:
            return type(error).__name__
