"""The journal of one server: entries that were accepted, how far they have come, and what became of them."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeVar

from tetriserve.core.errors import ConfigError
from tetriserve.core.events import Checkpoint, TensorRef
from tetriserve.core.stages import INPUT
from tetriserve.core.states import StateStore
from tetriserve.journal.database import NUM_COMMITS, Database, DatabaseErrors, read_database, replace_database
from tetriserve.journal.directory import Directory, sync_folder
from tetriserve.journal.kept import Kept, assembled
from tetriserve.journal.records import (
    Corrupt,
    Course,
    Entry,
    Failure,
    KeptFile,
    KeptImage,
    KeptOutput,
    KeptTensors,
    KeptVideo,
    Record,
    kind_of,
    record_of,
    row_of,
)
from tetriserve.journal.writer import Batch, Writer, reason
from tetriserve.workload.outcome import Outcome

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class Model:
    """One that is served. key: see `core.models`."""

    name: str
    fingerprint: str
    key: str = ""


class Journal:
    """A directory that is held until `close`. Times are unix time, but for those within requests, runs and outcomes.

    What comes back as a future is on disk, or read from it, when the future is done; it raises JournalError if that
    cannot be. Whatever is read is verified: what is not as it was written is logged, counted and treated as absent.

    corrupt: what was found so, by kind: `record`, `file`, `database`, or `commit` for each that was lost.

    models: those that are served, by key.

    Raises:
        ConfigError: the directory is in use, cannot be used, or holds work of a server of another model alone. A
            journal that is sound opens on a full disk, too.
    """

    def __init__(self, path: Path, *models: Model) -> None:
        self.models = {model.key: model for model in models}
        self.corrupt: Counter[str] = Counter()
        self._directory = Directory(path)
        try:
            self._loaded = self._load(path)
            self._database = Database(self._directory.database)
            self._directory.note_commits(self._database.num_commits)
        except (*DatabaseErrors, OSError) as error:
            self._directory.release()
            raise ConfigError(
                f"journal {path} cannot be opened: {reason(error)}; make room, or name another directory"
            ) from None
        except ConfigError:
            self._directory.release()
            raise
        try:
            self._database.shorten_log()
            sync_folder(path)
        except (*DatabaseErrors, OSError) as error:  # what is there is whole, and requests without a key can be served
            logger.error("the journal cannot be written: %s; requests with a key are refused until it can", error)
        self._directory.remove_orphans({file.name for kept in self._loaded for file in kept.files})
        self._courses = {
            name: kept.courses.get(name, Course(request_id=name))
            for kept in self._loaded
            if kept.ended_at is None
            for name in kept.entry.request_ids
            if name not in kept.outputs
        }
        self._writer = Writer(self._database, self._directory)
        self._closing = threading.Lock()
        self._is_closed = False

    @property
    def num_errors(self) -> int:
        """Reads and writes that failed since the start."""
        return self._writer.num_errors

    @property
    def num_waiting(self) -> int:
        """Changes that are not on disk yet."""
        return self._writer.num_waiting

    def model_of(self, entry: Entry) -> Model | None:
        """The served model that an entry's requests are for; None if it is not served.

        It is the one with their key and fingerprint. A server of one model has no key for it, so that after a change
        from one model to several, or back, the fingerprint alone decides.
        """
        key = entry.requests[0].model
        alike = [model for model in self.models.values() if model.fingerprint == entry.fingerprint]
        if "" in (key, *self.models):
            return next(iter(alike), None)
        return next((model for model in alike if model.key == key), None)

    def take_loaded(self) -> list[Kept]:
        """What was there at the start, in order of arrival. Ask once: it is not kept in memory."""
        loaded, self._loaded = self._loaded, []
        return loaded

    def accept(
        self, entry: Entry, begin: Mapping[str, Checkpoint | None] | None = None, store: StateStore | None = None
    ) -> Future[None]:
        """`begin`: what each request brings along in `store`, by request id; it is kept from now on.

        Raises (in the future): JournalError, also if that is gone from the store.
        """

        def work(batch: Batch) -> None:
            batch.put(entry)
            for name in entry.request_ids:
                course = Course(request_id=name)
                checkpoint = (begin or {}).get(name)
                if checkpoint is not None:
                    assert store is not None
                    states = {
                        stage: KeptTensors(ref.key, self._directory.write(ref.key, store.get(ref)))
                        for stage, ref in checkpoint.states.items()
                    }
                    course = replace(course, states=states)
                    batch.put(course)
                self._courses[name] = course

        return self._writer.submit(work)

    def advance(self, request_id: str, num_starts: int, checkpoint: Checkpoint | None, store: StateStore) -> None:
        """Note how far a request has come, some time soon; a newer note takes the place of one that waits.

        num_starts: as in `Course`. What is gone from `store` is left out, since something newer is there.
        """

        def work(batch: Batch) -> None:
            self._advance(batch, request_id, num_starts, checkpoint, store)

        self._writer.submit_late(request_id, work)

    def clear_starts(self, name: str) -> Future[None]:
        """Of an entry's requests: none of them is what brings the server down."""

        def work(batch: Batch) -> None:
            kept = self._kept(name)
            for course in () if kept is None else kept.courses.values():
                self._courses[course.request_id] = replace(course, num_starts=0)
                batch.put(self._courses[course.request_id])

        return self._writer.submit(work)

    def keep_picture(self, outcome: Outcome, shape: tuple[int, ...], pixels: bytes, stored_at: float) -> Future[None]:
        def work(batch: Batch) -> None:
            request_id = outcome.request.request_id
            file = self._directory.write(f"{request_id}.pixels", pixels)
            batch.put(KeptImage(request_id=request_id, stored_at=stored_at, outcome=outcome, shape=shape, file=file))
            self._drop_course(batch, request_id)

        return self._writer.submit(work)

    def keep_video(self, outcome: Outcome, video: bytes, thumbnail: bytes, stored_at: float) -> Future[KeptVideo]:
        def work(batch: Batch) -> KeptVideo:
            request_id = outcome.request.request_id
            kept = KeptVideo(
                request_id=request_id,
                stored_at=stored_at,
                outcome=outcome,
                video=self._directory.write(f"{request_id}.mp4", video),
                thumbnail=self._directory.write(f"{request_id}.jpg", thumbnail),
            )
            batch.put(kept)
            self._drop_course(batch, request_id)
            return kept

        return self._writer.submit(work)

    def fail(self, failure: Failure) -> Future[None]:
        """The entry ends without its outputs; those that are there go."""

        def work(batch: Batch) -> None:
            kept = self._kept(failure.entry)
            if kept is not None:
                self._drop_requests(batch, kept.entry.request_ids)
                batch.put(failure)

        return self._writer.submit(work)

    def drop(self, name: str) -> Future[None]:
        """Forget an entry and all that belongs to it."""

        def work(batch: Batch) -> None:
            kept = self._kept(name)
            if kept is not None:
                self._drop_requests(batch, kept.entry.request_ids)
            batch.drop(Entry, name)
            batch.drop(Failure, name)

        return self._writer.submit(work)

    def read(self, name: str) -> Future[Kept | None]:
        """All that is known of an entry; None if it cannot be read any more."""
        return self._writer.submit(lambda batch: self._kept(name))

    def read_pixels(self, picture: KeptImage) -> Future[bytes | None]:
        return self._writer.submit(lambda batch: self._read(picture.file))

    def path_of(self, file: KeptFile) -> Path:
        """Of a file of a video; what is in it is known only of one that was opened."""
        return self._directory.path_of(file)

    def open(self, file: KeptFile) -> BinaryIO | None:
        """To be read by any thread, once all of it was verified, which takes as long as to read it."""
        try:
            return self._directory.open(file)
        except Corrupt as error:
            self._report("file", error)
            return None

    def restore(self, course: Course, store: StateStore) -> Future[Checkpoint | None]:
        """Bring a request's state into `store`; None if there is none, or not all of it.

        What it brought along is state of its own: should other state be lost, it begins anew with that.
        """

        def work(batch: Batch) -> Checkpoint | None:
            if not course.states:
                return None
            read = {stage: self._read(kept.file) for stage, kept in course.states.items()}
            restored = course
            if None in read.values():
                brought = {stage: course.states[stage] for stage in (INPUT,) if read.get(stage) is not None}
                restored = Course(request_id=course.request_id, num_starts=course.num_starts, states=brought)
                self._courses[course.request_id] = restored
                batch.put(restored)
                batch.drop_files(file for file in course.files if file not in restored.files)
            if not restored.states:
                return None
            refs = {stage: store.put(kept.key, read[stage] or b"") for stage, kept in restored.states.items()}
            return Checkpoint(restored.stage_index, restored.stage_steps_done, refs, restored.runs)

        return self._writer.submit(work)

    def shorten_log(self) -> Future[None]:
        """Keep the write-ahead log from growing."""
        return self._writer.submit(lambda batch: self._database.shorten_log())

    def close(self) -> None:
        """Finish what waits and let go of the directory. May be called again."""
        with self._closing:
            if not self._is_closed:
                self._is_closed = True
                self._writer.close()
                self._database.close()
                self._directory.release()

    def _load(self, path: Path) -> list[Kept]:
        """Entries in order of arrival. A damaged database is replaced by what is sound of it.

        Raises:
            ConfigError: they are those of a server of another model alone.
        """
        content = read_database(self._directory.database)
        records = [record for row in content.rows if (record := self._verified(row)) is not None]
        kept = assembled(records)
        for entry in (one.entry for one in kept):
            if not entry.requests[0].model and self.model_of(entry) is None:
                served = " or ".join(f"{model.name!r} ({model.fingerprint})" for model in self.models.values())
                raise ConfigError(
                    f"journal {path} holds work of model {entry.model!r} ({entry.fingerprint}), not of {served}; "
                    "serve that one, or name another directory"
                )
        num_commits = self._checked_commits(content.num_commits)
        if content.damage is None and len(records) == len(content.rows):
            return kept
        if content.damage is not None:
            self.corrupt["database"] += 1
        aside = replace_database(self._directory.database, map(row_of, records), num_commits)
        logger.error(
            "the journal is damaged (%s): %s keeps it, and a new one goes on with the %d of %d records that are sound",
            content.damage or "records do not match their checksums", aside, len(records), len(content.rows),
        )  # fmt: skip
        return kept

    def _checked_commits(self, found: int | None) -> int:
        """The number of commits so far, of which the database has `found`; those that it lost are counted.

        SQLite ends its log at the first frame that is damaged, and says nothing of what was behind it.
        """
        noted = self._directory.read_commits()
        if found is None or noted is None:
            return noted or found or 0
        num_lost = (noted - found) % NUM_COMMITS
        if not 0 < num_lost < NUM_COMMITS // 2:
            return found
        self.corrupt["commit"] += num_lost
        logger.error(
            "the journal has lost its last %d commits: its write-ahead log is damaged or gone. Keys that were "
            "accepted in them are free again", num_lost,
        )  # fmt: skip
        return noted

    def _verified(self, row: tuple[object, ...]) -> Record | None:
        try:
            return record_of(row)
        except Corrupt as error:
            self._report("record", error)
            return None

    def _report(self, kind: str, error: Corrupt) -> None:
        self.corrupt[kind] += 1
        logger.error("the journal is corrupt, and goes on without: %s", error)

    # What follows runs on the writer's thread.

    def _kept(self, name: str) -> Kept | None:
        entry = self._get(Entry, name)
        if entry is None:
            return None
        names = entry.request_ids
        return Kept(
            entry=entry,
            courses={one: self._courses[one] for one in names if one in self._courses},
            outputs={one: output for one in names if (output := self._output(one)) is not None},
            failure=self._get(Failure, name),
        )

    def _output(self, request_id: str) -> KeptOutput | None:
        return self._get(KeptImage, request_id) or self._get(KeptVideo, request_id)

    def _get(self, kind: type[R], name: str) -> R | None:
        row = self._database.get(kind_of(kind), name)
        record = None if row is None else self._verified(row)
        return record if isinstance(record, kind) else None

    def _read(self, file: KeptFile) -> bytes | None:
        try:
            return self._directory.read(file)
        except Corrupt as error:
            self._report("file", error)
            return None

    def _advance(
        self, batch: Batch, request_id: str, num_starts: int, checkpoint: Checkpoint | None, store: StateStore
    ) -> None:
        before = self._courses.get(request_id)
        if before is None:
            return  # it has ended meanwhile
        course = Course(request_id=request_id, num_starts=num_starts)
        if checkpoint is not None:
            states = {
                stage: kept
                for stage, ref in checkpoint.states.items()
                if (kept := self._copied(ref, before.states.get(stage), store)) is not None
            }
            if len(states) < len(checkpoint.states):
                course = replace(before, num_starts=num_starts)
            else:
                course = replace(
                    course,
                    stage_index=checkpoint.stage_index,
                    stage_steps_done=checkpoint.stage_steps_done,
                    runs=checkpoint.runs,
                    states=states,
                )
        batch.put(course)
        batch.drop_files(file for file in before.files if file.name not in {kept.name for kept in course.files})
        self._courses[request_id] = course

    def _copied(self, ref: TensorRef, before: KeptTensors | None, store: StateStore) -> KeptTensors | None:
        """The copy that is there already, or a new one; None if there is nothing to copy any more."""
        if before is not None and before.key == ref.key:
            return before
        try:
            data = store.get(ref)
        except OSError:
            return None
        return KeptTensors(ref.key, self._directory.write(ref.key, data))

    def _drop_requests(self, batch: Batch, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._drop_course(batch, request_id)
            for kind in (KeptImage, KeptVideo):
                batch.drop(kind, request_id)
            batch.stale_files += [f"{request_id}.{suffix}" for suffix in ("pixels", "mp4", "jpg")]

    def _drop_course(self, batch: Batch, request_id: str) -> None:
        course = self._courses.pop(request_id, None)
        if course is not None:
            batch.drop(Course, request_id)
            batch.drop_files(course.files)
