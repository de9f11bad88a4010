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

from tetriserve.core.errors import JournalError, RequestFailed, ShuttingDown
from tetriserve.core.events import FailureKind, Submitted
from tetriserve.core.models import of_model
from tetriserve.core.request import Request
from tetriserve.core.stages import INPUT
from tetriserve.engine.courses import Courses
from tetriserve.engine.intake import Generation
from tetriserve.engine.jobs import Job, Jobs, Known, Tell
from tetriserve.engine.live import LiveEngine
from tetriserve.engine.progress import Admitted, GeneratedImage, Progress, first_progress
from tetriserve.engine.suspects import HOLD_S, MAX_STARTS, Trials, is_guilty, is_suspect, num_starts
from tetriserve.executor.protocol import Executor
from tetriserve.journal import Course, Entry, Failure, Journal, Kept, KeptImage, Key
from tetriserve.journal.times import moved_outcome, moved_request, moved_runs
from tetriserve.logs import fields

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
    ) -> None:
        super().__init__(engine, result_ttl_s=result_ttl_s, wall_clock=wall_clock)
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
            before = self._known.pop(key, None)
            if before is not None and before.name is not None:  # dropping it failed
                self.journal.drop(before.name)
            known = Known(kept.entry.digest, kept.entry.name, kept.ended_at, kept.failure is not None)
            self._known[key] = known
            if kept.ended_at is None:
                unfinished.append((kept, known))
        self._expire()
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
        job = Job()
        return self._begin(known, job, self._replay(key, known, job.tell))

    def _rest(self, known: Known) -> None:
        known.job = None  # its images are in the journal: the next call reads them there

    async def _execute(
        self, key: Key, known: Known, generations: Sequence[Generation], tell: Tell
    ) -> list[GeneratedImage]:
        accepted: list[str] = []

        async def accept(arriving: Sequence[Submitted]) -> None:
            entry = self._entry(key, known.digest, [event.request for event in arriving])
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

    async def _replay(self, key: Key, known: Known, tell: Tell) -> list[GeneratedImage]:
        """What is in the journal; what is missing or corrupt is done again, with the same seed."""
        images, admitted = await self._readmit(key, known, tell)
        return await self._see_through(known, images, admitted, tell)

    async def _see_through(
        self, known: Known, images: dict[int, GeneratedImage], admitted: Mapping[int, Admitted], tell: Tell
    ) -> list[GeneratedImage]:
        """As `Jobs`; what stays open is gone on with in the next life of the server, too."""
        try:
            return await super()._see_through(known, images, admitted, tell)
        except ShuttingDown:
            self._courses.clear_starts(client.request.request_id for client in admitted.values())
            raise
        finally:
            self._courses.leave(client.request.request_id for client in admitted.values())

    async def _take_up(self, kept: Kept, known: Known) -> None:
        key, job = kept.entry.key, Job()
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
            images, admitted = await self._readmit(key, known, job.tell)
            self._begin(known, job, self._see_through(known, images, admitted, job.tell))

    async def _try(self, key: Key, known: Known, tell: Tell) -> list[GeneratedImage]:
        """See a suspect through when its turn has come."""
        async with self._trials.turn():
            images, admitted = await self._readmit(key, known, tell, is_suspect=True)
            return await self._see_through(known, images, admitted, tell)

    async def _readmit(
        self, key: Key, known: Known, tell: Tell, *, is_suspect: bool = False
    ) -> tuple[dict[int, GeneratedImage], dict[int, Admitted]]:
        """Of an entry's images those that are there, and those that are to be made, by number.

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
        images = {}
        for number, request_id in enumerate(kept.entry.request_ids):
            picture = kept.pictures.get(request_id)
            image = None if picture is None else await self._image(picture)
            if image is not None:
                images[number] = image
                tell(number, image)
        missing = [number for number in range(len(kept.entry.requests)) if number not in images]
        if not missing:
            return images, {}
        try:
            return images, await self._resume(kept, missing, tell, is_suspect)
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

    async def _keep(self, image: GeneratedImage) -> None:
        outcome, pixels = image.outcome, image.pixels
        relative = moved_outcome(outcome, -outcome.request.arrival_s)
        copied = await asyncio.to_thread(pixels.tobytes)
        stored = self.journal.keep_picture(relative, pixels.shape, copied, self._wall_clock())
        await asyncio.wrap_future(stored)

    async def _image(self, picture: KeptImage) -> GeneratedImage | None:
        import numpy as np

        data = await asyncio.wrap_future(self.journal.read_pixels(picture))
        if data is None or len(data) != math.prod(picture.shape):
            return None
        return GeneratedImage(np.frombuffer(data, np.uint8).reshape(picture.shape), picture.outcome)

    async def _fail(self, known: Known, error: RequestFailed) -> None:
        assert known.name is not None
        failed_at = self._wall_clock()
        failure = Failure(entry=known.name, failed_at=failed_at, message=str(error), kind=error.kind)
        await asyncio.wrap_future(self.journal.fail(failure))
        known.ended_at, known.has_failed = failed_at, True

    def _entry(self, key: Key, digest: str, requests: Sequence[Request]) -> Entry:
        arrival_s = requests[0].arrival_s
        model = of_model(self.journal.models, requests[0].model)
        return Entry(
            key=key,
            digest=digest,
            model=model.name,
            fingerprint=model.fingerprint,
            arrived_at=self._wall_clock() - (self.engine.now - arrival_s),
            requests=tuple(moved_request(request, -arrival_s) for request in requests),
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
