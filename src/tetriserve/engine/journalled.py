"""Jobs that outlive the server: what a journal adds to `engine.jobs`.

A job is in the journal before it is admitted, how far it has come follows as its tasks end, and its images are there
before anybody is given them. A server that starts takes up what the one before left unfinished.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import BinaryIO

from tetriserve.core.errors import JournalError, RequestFailed, ShuttingDown
from tetriserve.core.events import FailureKind, Submitted
from tetriserve.core.models import of_model
from tetriserve.core.request import Request
from tetriserve.core.stages import INPUT
from tetriserve.engine.courses import Courses
from tetriserve.engine.intake import Generation
from tetriserve.engine.job import Job, Known, Tell
from tetriserve.engine.jobs import Jobs
from tetriserve.engine.live import LiveEngine
from tetriserve.engine.progress import (
    Admitted,
    Generated,
    GeneratedImage,
    GeneratedVideo,
    Progress,
    StoredFile,
    StoredVideo,
    first_progress,
)
from tetriserve.engine.suspects import HOLD_S, MAX_STARTS, Trials, is_guilty, is_suspect, num_starts
from tetriserve.engine.videos import MAX_BYTES, Video
from tetriserve.executor.protocol import Executor
from tetriserve.journal import Course, Entry, Failure, Journal, Kept, KeptFile, KeptImage, KeptVideo, Key
from tetriserve.journal.times import moved_outcome, moved_request, moved_runs
from tetriserve.logs import fields
from tetriserve.models.video_file import VideoFile
from tetriserve.workload.outcome import Outcome

logger = logging.getLogger(__name__)


class JournalledJobs(Jobs):
    """As `Jobs`, with those of earlier lives of the server. Images are in the journal, and in memory for no longer than
    somebody waits.

    wall_clock: unix time, by which deadlines and results are kept across lives of the server.
    hold_s: see `engine.suspects`.
    num_resumed, num_steps_saved: requests taken up from an earlier life, and their steps that were not done again.
    num_replayed: calls that were answered from the journal.
    """

    is_durable = True

    def __init__(
        self,
        engine: LiveEngine,
        executor: Executor,
        journal: Journal,
        *,
        result_ttl_s: float,
        wall_clock: Callable[[], float] = time.time,
        hold_s: float = HOLD_S,
        max_video_bytes: int = MAX_BYTES,
    ) -> None:
        super().__init__(engine, result_ttl_s=result_ttl_s, wall_clock=wall_clock, max_video_bytes=max_video_bytes)
        self.journal = journal
        self.num_resumed = 0
        self.num_steps_saved = 0
        self.num_replayed = 0
        self._executor = executor
        self._courses = Courses(journal, executor.states)
        self._trials = Trials(hold_s)
        engine.subscribe(self._courses.observe)

    async def recover(self) -> None:
        """Take up what an earlier life left: call it once, before anybody calls."""
        unfinished: list[tuple[Kept, Known]] = []
        for kept in self.journal.take_loaded():
            key = kept.entry.key
            before = self._known.get(key)
            if before is not None:  # dropping it failed
                self._forget(key, before)
            known = self._known_of(kept)
            if kept.ended_at is None:
                unfinished.append((kept, known))
        self._expire()
        self._make_room()
        for kept, known in unfinished:
            try:
                await self._take_up(kept, known)
            except (RequestFailed, JournalError) as error:
                logger.error("request %s was not taken up: %s", known.name, error)
        if unfinished:
            logger.info(
                "took up %d requests of an earlier life, %d of their steps already done",
                self.num_resumed, self.num_steps_saved,
            )  # fmt: skip
        self._begin_sweeping()

    async def _close(self) -> None:
        self._trials.close()
        await super()._close()
        await asyncio.to_thread(self.journal.close)

    def _reopen(self, key: Key, known: Known, generations: Sequence[Generation]) -> Job:
        self.num_replayed += 1
        job = Job(known.hear)
        return self._begin(known, job, self._replay(key, known, job.tell))

    def _go_on(self, video: Video) -> None:
        if video.ended_at is None and video.job is None:
            self._reopen(video.key, video, ())

    def _rest(self, known: Known) -> None:
        super()._rest(known)
        known.job = None  # what it made is in the journal: the next call reads it there

    async def _execute(self, key: Key, known: Known, generations: Sequence[Generation], tell: Tell) -> list[Generated]:
        accepted: list[str] = []

        async def accept(arriving: Sequence[Submitted]) -> None:
            entry = self._entry(key, known, [event.request for event in arriving])
            known.name = entry.name
            begin = {event.request.request_id: event.checkpoint for event in arriving}
            await asyncio.wrap_future(self.journal.accept(entry, begin, self._executor.states))
            for event in arriving:
                accepted.append(event.request.request_id)
                self._courses.follow(event.request, checkpoint=event.checkpoint)

        try:
            admitted = await self.engine.admit(generations, self._watch(range(len(generations)), tell), accept)
        except BaseException:
            self._courses.leave(accepted)
            self._forget(key, known)
            raise
        return await self._see_through(known, {}, dict(enumerate(admitted)), tell)

    async def _replay(self, key: Key, known: Known, tell: Tell) -> list[Generated]:
        """What is in the journal; what is missing or corrupt is done again, with the same seed."""
        made, admitted = await self._readmit(key, known, tell)
        return await self._see_through(known, made, admitted, tell)

    async def _see_through(
        self, known: Known, made: dict[int, Generated], admitted: Mapping[int, Admitted], tell: Tell
    ) -> list[Generated]:
        """As `Jobs`; what stays open is gone on with in the next life of the server, too."""
        try:
            return await super()._see_through(known, made, admitted, tell)
        except ShuttingDown:
            self._courses.clear_starts(client.request.request_id for client in admitted.values())
            raise
        finally:
            self._courses.leave(client.request.request_id for client in admitted.values())

    async def _take_up(self, kept: Kept, known: Known) -> None:
        key, job = kept.entry.key, Job(known.hear)
        try:
            self._check_served(kept.entry)
        except RequestFailed as error:
            await self._fail(known, error)
            raise
        if is_guilty(kept):
            message = (
                f"the server or its workers went down {num_starts(kept)} times, each time at work for this request"
            )
            failure = RequestFailed(message, FailureKind.LOST)
            await self._fail(known, failure)
            raise failure
        if is_suspect(kept):
            logger.warning("request %s waits: the server went down %d times with it", known.name, num_starts(kept))
            await asyncio.wrap_future(self.journal.clear_starts(kept.entry.name))
            self._begin(known, job, self._try(key, known, job.tell))
        else:
            made, admitted = await self._readmit(key, known, job.tell)
            self._begin(known, job, self._see_through(known, made, admitted, job.tell))

    async def _try(self, key: Key, known: Known, tell: Tell) -> list[Generated]:
        """See a suspect through when its turn has come."""
        async with self._trials.turn():
            made, admitted = await self._readmit(key, known, tell, is_suspect=True)
            return await self._see_through(known, made, admitted, tell)

    async def _readmit(
        self, key: Key, known: Known, tell: Tell, *, is_suspect: bool = False
    ) -> tuple[dict[int, Generated], dict[int, Admitted]]:
        """Of an entry's outputs those that are there, and those that are to be made, by number.

        Raises:
            RequestFailed: it has failed, or cannot be read, or not the pictures that came with it.
        """
        assert known.name is not None
        kept = await asyncio.wrap_future(self.journal.read(known.name))
        if kept is None:
            self._forget(key, known)
            raise RequestFailed("what was kept under this key cannot be read any more; the same request starts anew")
        if kept.failure is not None:
            raise RequestFailed(kept.failure.message, kept.failure.kind)
        made: dict[int, Generated] = {}
        for number, request_id in enumerate(kept.entry.request_ids):
            output = kept.outputs.get(request_id)
            read = None if output is None else await self._read(output)
            if read is not None:
                made[number] = read
                tell(number, read)
        missing = [number for number in range(len(kept.entry.requests)) if number not in made]
        if not missing:
            return made, {}
        try:
            return made, await self._resume(kept, missing, tell, is_suspect)
        except RequestFailed as error:
            if error.kind is FailureKind.STEP:
                await self._fail(known, error)
            raise

    async def _resume(self, kept: Kept, missing: Sequence[int], tell: Tell, is_suspect: bool) -> dict[int, Admitted]:
        served = self._check_served(kept.entry)
        away_s = max(0.0, self._wall_clock() - kept.entry.arrived_at)
        arrival_s = self.engine.now - away_s
        requests = [moved_request(served[number], arrival_s) for number in missing]
        arriving = []
        try:
            for request in requests:
                course = kept.courses.get(request.request_id, Course(request_id=request.request_id))
                checkpoint = await asyncio.wrap_future(self.journal.restore(course, self._executor.states))
                if request.images and (checkpoint is None or INPUT not in checkpoint.states):
                    message = "the pictures that came with this request cannot be read any more; send it with a new key"
                    raise RequestFailed(message, FailureKind.STEP)
                self._courses.follow(request, MAX_STARTS if is_suspect else course.num_starts, checkpoint)
                if checkpoint is not None:
                    checkpoint = replace(checkpoint, runs=moved_runs(checkpoint.runs, arrival_s))
                arriving.append(Submitted(request, None, checkpoint))
            admitted = self.engine.resume(arriving, self._watch(missing, tell))
        except BaseException:  # such as a store without room: what is there of it already would take that for good
            for request in requests:
                self._executor.forget(request.request_id)
            self._courses.leave(request.request_id for request in requests)
            raise
        self.num_steps_saved += sum(first_progress(event).steps_done for event in arriving)
        self.num_resumed += len(admitted)
        return dict(zip(missing, admitted, strict=True))

    def _check_served(self, entry: Entry) -> list[Request]:
        """An entry's requests, for their model as it is called now.

        Raises:
            RequestFailed: their model, or an adapter that they were accepted with, is not served any more.
        """
        model = self.journal.model_of(entry)
        if model is None:
            raise RequestFailed(
                f"it was accepted for the model {entry.model!r}, with which this server was not started again: ask "
                "anew, or have it started with that --model"
            )
        requests = [replace(request, model=model.key) for request in entry.requests]
        for request in requests:
            if not self.engine.models.of(request).serves(request.lora):
                assert request.lora is not None
                raise RequestFailed(
                    f"it was accepted with the LoRA {request.lora.name!r}, with which this server was not started "
                    "again: ask anew, or have it started with that --lora"
                )
        return requests

    async def _keep(self, made: Generated) -> Generated:
        outcome = made.outcome
        relative = moved_outcome(outcome, -outcome.request.arrival_s)
        if isinstance(made, GeneratedVideo):
            assert isinstance(made.content, VideoFile), "it was just made"
            files = made.content
            kept = await asyncio.wrap_future(
                self.journal.keep_video(relative, files.video, files.thumbnail, self._wall_clock())
            )
            return self._stored(kept, outcome)
        copied = await asyncio.to_thread(made.pixels.tobytes)
        stored = self.journal.keep_picture(relative, made.pixels.shape, copied, self._wall_clock())
        await asyncio.wrap_future(stored)
        return made

    async def _read(self, output: KeptImage | KeptVideo) -> Generated | None:
        """None if it is not as it was written."""
        if isinstance(output, KeptImage):
            return await self._image(output)
        for file in output.files:
            opened = await asyncio.to_thread(self.journal.open, file)
            if opened is None:
                return None
            opened.close()
        return self._stored(output, output.outcome)

    async def _image(self, picture: KeptImage) -> GeneratedImage | None:
        import numpy as np

        data = await asyncio.wrap_future(self.journal.read_pixels(picture))
        if data is None or len(data) != math.prod(picture.shape):
            return None
        return GeneratedImage(np.frombuffer(data, np.uint8).reshape(picture.shape), picture.outcome)

    def _stored(self, kept: KeptVideo, outcome: Outcome) -> GeneratedVideo:
        video, thumbnail = (
            StoredFile(self.journal.path_of(file), file.num_bytes, file.checksum) for file in kept.files
        )
        return GeneratedVideo(StoredVideo(video, thumbnail, kept.stored_at), outcome)

    def _known_of(self, kept: Kept) -> Known:
        """What an earlier life's key stands for, noted."""
        entry, failure = kept.entry, kept.failure
        known = Known(entry.digest)
        if entry.video is not None:
            made = next((one for one in kept.outputs.values() if isinstance(one, KeptVideo)), None)
            video = known = Video(
                digest=entry.digest, key=entry.key, facts=entry.video, created_at=entry.arrived_at,
                request=entry.requests[0],
            )  # fmt: skip
            if made is not None:
                video.hear(0, self._stored(made, made.outcome))
            self._add(video)
        self._known[entry.key] = known
        known.name, known.ended_at = entry.name, kept.ended_at
        known.failure = None if failure is None else RequestFailed(failure.message, failure.kind)
        return known

    def _remove_files(self, video: Video) -> None:
        """They go with its entry."""

    async def _drop(self, video: Video) -> None:
        if video.name is not None:
            await asyncio.wrap_future(self.journal.drop(video.name))

    def _open(self, file: StoredFile) -> BinaryIO | None:
        return self.journal.open(KeptFile(file.path.name, file.num_bytes, file.checksum))

    def _lose(self, video: Video) -> None:
        logger.warning("video %s was damaged, and is made again", video.facts.id)
        video.lose()
        self._go_on(video)

    async def _fail(self, known: Known, error: RequestFailed) -> None:
        assert known.name is not None
        failed_at = self._wall_clock()
        failure = Failure(entry=known.name, failed_at=failed_at, message=str(error), kind=error.kind)
        await asyncio.wrap_future(self.journal.fail(failure))
        known.ended_at, known.failure = failed_at, error

    def _entry(self, key: Key, known: Known, requests: Sequence[Request]) -> Entry:
        arrival_s = requests[0].arrival_s
        arrived_at = self._wall_clock() - (self.engine.now - arrival_s)
        if isinstance(known, Video):
            known.created_at = arrived_at
        model = of_model(self.journal.models, requests[0].model)
        return Entry(
            key=key,
            digest=known.digest,
            model=model.name,
            fingerprint=model.fingerprint,
            arrived_at=arrived_at,
            requests=tuple(moved_request(request, -arrival_s) for request in requests),
            video=known.facts if isinstance(known, Video) else None,
        )

    def _note(self, progress: Progress) -> None:
        if progress.degree:
            self._courses.note_start(progress.request.request_id)

    def _forget(self, key: Key, known: Known) -> None:
        """Free the key and what the journal has of it; should that fail, the next start does it."""
        super()._forget(key, known)
        if known.name is not None:
            logger.debug("request %s leaves the journal", known.name, extra=fields(image_ids=known.name))
            self.journal.drop(known.name)

    async def _clear_up(self) -> None:
        await super()._clear_up()
        with suppress(JournalError):  # logged where it failed
            await asyncio.wrap_future(self.journal.shorten_log())
