"""Work under a key of its client's: done once, whatever becomes of the connection or of this server.

It is in the journal before it is admitted, how far it has come follows as its tasks end, and its images are there
before anybody is given them. A server that starts takes up what the one before left unfinished.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from tetriserve.core.errors import JournalError, KeyReused, RequestFailed, ShuttingDown
from tetriserve.core.events import FailureKind, Submitted
from tetriserve.core.request import Request
from tetriserve.engine.courses import Courses
from tetriserve.engine.intake import Generation
from tetriserve.engine.live import LiveEngine
from tetriserve.engine.progress import Admitted, GeneratedImage, Progress, Watcher, first_progress
from tetriserve.engine.shared import SharedWork
from tetriserve.engine.suspects import HOLD_S, MAX_STARTS, Trials, is_guilty, is_suspect, num_starts
from tetriserve.executor.protocol import Executor
from tetriserve.journal import Course, Entry, Failure, Journal, Kept, KeptImage, Key
from tetriserve.journal.times import moved_outcome, moved_request, moved_runs
from tetriserve.logs import fields

logger = logging.getLogger(__name__)

_SWEEP_S = 60.0
_FREE_FIELDS = {"slo_s", "priority", "reject_infeasible", "request_id"}
"""What may differ between retries: no picture depends on it."""

Tell = Callable[[int, Progress | GeneratedImage], None]


@dataclass
class _Known:
    """What a key stands for. `name` is its entry's in the journal, None until it is accepted."""

    digest: str
    name: str | None = None
    ended_at: float | None = None
    has_failed: bool = False
    work: SharedWork | None = None


class DurableWork:
    """All work under keys, of the past `result_ttl_s` seconds and unfinished. Lives on the engine's event loop.

    wall_clock: unix time, by which deadlines and results are kept across lives of the server.
    hold_s: see `engine.suspects`.
    num_resumed, num_steps_saved: requests taken up from an earlier life, and their steps that were not done again.
    num_replayed: calls that were answered from the journal.
    """

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
        self.journal = journal
        self.num_resumed = 0
        self.num_steps_saved = 0
        self.num_replayed = 0
        self._engine = engine
        self._executor = executor
        self._result_ttl_s = result_ttl_s
        self._wall_clock = wall_clock
        self._known: dict[Key, _Known] = {}
        self._courses = Courses(journal, executor.states)
        self._trials = Trials(hold_s)
        self._sweeper: asyncio.Task[None] | None = None
        engine.subscribe(self._courses.observe)

    def is_known(self, key: Key) -> bool:
        """Whether a call with `key` joins what is there already."""
        return self._find(key) is not None

    def call(self, key: Key, generations: Sequence[Generation], held: ExitStack | None = None) -> SharedWork:
        """What `key` stands for: begun now, running already, or over, in which case it comes from the journal.

        `held` is closed when new work ends, or at once if there is none.

        Raises:
            KeyReused: it stands for other pictures.
        """
        digest = digest_of(generations)
        known = self._find(key)
        if known is None:
            known = self._known[key] = _Known(digest)
            work = SharedWork()
            return self._begin(known, work, self._execute(key, known, generations, work.tell), held)
        if held is not None:
            held.close()
        if known.digest != digest:
            raise KeyReused("this key stands for other pictures already; a new request needs a new one")
        if known.work is None:
            self.num_replayed += 1
            work = SharedWork()
            return self._begin(known, work, self._replay(key, known, work.tell))
        return known.work

    async def recover(self) -> None:
        """Take up what an earlier life left: call it once, before anybody else calls."""
        unfinished: list[tuple[Kept, _Known]] = []
        for kept in self.journal.take_loaded():
            key = kept.entry.key
            before = self._known.pop(key, None)
            if before is not None and before.name is not None:  # dropping it failed
                self.journal.drop(before.name)
            known = _Known(kept.entry.digest, kept.entry.name, kept.ended_at, kept.failure is not None)
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
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """Let work end that the engine has ended, and close the journal. May be called again."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._trials.close()
        for known in list(self._known.values()):
            if known.work is not None:
                await known.work.wait()
        await asyncio.to_thread(self.journal.close)

    def count(self) -> Counter[str]:
        """Keys by state: open, finished, failed."""
        return Counter(
            "open" if known.ended_at is None else "failed" if known.has_failed else "finished"
            for known in self._known.values()
        )

    def _begin(
        self,
        known: _Known,
        work: SharedWork,
        making: Coroutine[Any, Any, list[GeneratedImage]],
        held: ExitStack | None = None,
    ) -> SharedWork:
        def rest() -> None:
            known.work = None  # its images are in the journal: the next call reads them there
            if held is not None:
                held.close()

        known.work = work
        work.run(making, rest)
        return work

    async def _execute(
        self, key: Key, known: _Known, generations: Sequence[Generation], tell: Tell
    ) -> list[GeneratedImage]:
        """New work. A refusal leaves nothing, so that the key can be used again."""

        accepted: list[str] = []

        async def accept(requests: Sequence[Request]) -> None:
            entry = self._entry(key, known.digest, requests)
            known.name = entry.name
            await asyncio.wrap_future(self.journal.accept(entry))
            for request in requests:
                accepted.append(request.request_id)
                self._courses.follow(request)

        try:
            admitted = await self._engine.admit(generations, self._watch(range(len(generations)), tell), accept)
        except BaseException:
            self._courses.leave(accepted)
            self._forget(key, known)
            raise
        return await self._see_through(known, {}, dict(enumerate(admitted)), tell)

    async def _take_up(self, kept: Kept, known: _Known) -> None:
        key, work = kept.entry.key, SharedWork()
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
            self._begin(known, work, self._try(key, known, work.tell))
        else:
            images, admitted = await self._readmit(key, known, work.tell)
            self._begin(known, work, self._see_through(known, images, admitted, work.tell))

    async def _try(self, key: Key, known: _Known, tell: Tell) -> list[GeneratedImage]:
        """See a suspect through when its turn has come."""
        async with self._trials.turn():
            images, admitted = await self._readmit(key, known, tell, is_suspect=True)
            return await self._see_through(known, images, admitted, tell)

    async def _replay(self, key: Key, known: _Known, tell: Tell) -> list[GeneratedImage]:
        """What is in the journal; what is missing or corrupt is done again, with the same seed."""
        images, admitted = await self._readmit(key, known, tell)
        return await self._see_through(known, images, admitted, tell)

    async def _readmit(
        self, key: Key, known: _Known, tell: Tell, *, is_suspect: bool = False
    ) -> tuple[dict[int, GeneratedImage], dict[int, Admitted]]:
        """Of an entry's images those that are there, and those that are to be made, by number.

        Raises:
            RequestFailed: it has failed, or cannot be read.
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
        return images, await self._resume(kept, missing, tell, is_suspect)

    async def _resume(self, kept: Kept, missing: Sequence[int], tell: Tell, is_suspect: bool) -> dict[int, Admitted]:
        away_s = max(0.0, self._wall_clock() - kept.entry.arrived_at)
        arrival_s = self._engine.now - away_s
        requests = [moved_request(kept.entry.requests[number], arrival_s) for number in missing]
        arriving = []
        try:
            for request in requests:
                course = kept.courses.get(request.request_id, Course(request_id=request.request_id))
                checkpoint = await asyncio.wrap_future(self.journal.restore(course, self._executor.states))
                self._courses.follow(request, MAX_STARTS if is_suspect else course.num_starts, checkpoint)
                if checkpoint is not None:
                    checkpoint = replace(checkpoint, runs=moved_runs(checkpoint.runs, arrival_s))
                arriving.append(Submitted(request, None, checkpoint))
            admitted = self._engine.resume(arriving, self._watch(missing, tell))
        except BaseException:  # such as a store without room: what is there of it already would take that for good
            for request in requests:
                self._executor.forget(request.request_id)
            self._courses.leave(request.request_id for request in requests)
            raise
        self.num_steps_saved += sum(first_progress(event).steps_done for event in arriving)
        self.num_resumed += len(admitted)
        return dict(zip(missing, admitted, strict=True))

    async def _see_through(
        self, known: _Known, images: dict[int, GeneratedImage], admitted: Mapping[int, Admitted], tell: Tell
    ) -> list[GeneratedImage]:
        """Keep each image as it comes, and tell of it only then.

        What ends otherwise than by an image or a failure of its own stays in the journal as it is: the next call, or
        the next life of the server, goes on with it. Lost workers, a lack of memory and a failed scheduler are not its
        own: it would succeed on a host that is well.
        """

        async def keep(number: int, client: Admitted) -> None:
            image = await client.image
            await self._keep(image)
            images[number] = image
            tell(number, image)

        try:
            await asyncio.gather(*(keep(number, client) for number, client in admitted.items()))
        except RequestFailed as error:
            self._engine.leave([*admitted.values()])
            if error.kind is FailureKind.STEP:
                await self._fail(known, error)
            raise
        except ShuttingDown:
            self._courses.clear_starts(client.request.request_id for client in admitted.values())
            raise
        finally:
            self._engine.leave([*admitted.values()])
            self._courses.leave(client.request.request_id for client in admitted.values())
        if known.ended_at is None:
            known.ended_at = self._wall_clock()
        return [images[number] for number in sorted(images)]

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

    async def _fail(self, known: _Known, error: RequestFailed) -> None:
        assert known.name is not None
        failed_at = self._wall_clock()
        failure = Failure(entry=known.name, failed_at=failed_at, message=str(error), kind=error.kind)
        await asyncio.wrap_future(self.journal.fail(failure))
        known.ended_at, known.has_failed = failed_at, True

    def _entry(self, key: Key, digest: str, requests: Sequence[Request]) -> Entry:
        arrival_s = requests[0].arrival_s
        model = self.journal.model
        return Entry(
            key=key,
            digest=digest,
            model=model.name,
            fingerprint=model.fingerprint,
            arrived_at=self._wall_clock() - (self._engine.now - arrival_s),
            requests=tuple(moved_request(request, -arrival_s) for request in requests),
        )

    def _watch(self, numbers: Sequence[int], tell: Tell) -> Watcher:
        """Passes on what the engine says, but for images: those are told of when they are in the journal."""

        def watch(index: int, update: Progress | GeneratedImage) -> None:
            if isinstance(update, Progress):
                if update.degree:
                    self._courses.note_start(update.request.request_id)
                tell(numbers[index], update)

        return watch

    def _find(self, key: Key) -> _Known | None:
        known = self._known.get(key)
        if known is not None and self._is_over(known, self._wall_clock()):
            self._forget(key, known)
            return None
        return known

    def _is_over(self, known: _Known, now: float) -> bool:
        return known.ended_at is not None and now > known.ended_at + self._result_ttl_s

    def _expire(self) -> None:
        now = self._wall_clock()
        for key, known in [*self._known.items()]:
            if self._is_over(known, now):
                self._forget(key, known)

    def _forget(self, key: Key, known: _Known) -> None:
        """Free the key and what the journal has of it; should that fail, the next start does it."""
        if self._known.get(key) is known:
            del self._known[key]
        if known.name is not None:
            logger.debug("request %s leaves the journal", known.name, extra=fields(image_ids=known.name))
            self.journal.drop(known.name)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(_SWEEP_S, self._result_ttl_s / 4))
            self._expire()
            with suppress(JournalError):  # logged where it failed
                await asyncio.wrap_future(self.journal.shorten_log())


def digest_of(generations: Sequence[Generation]) -> str:
    """Of what pictures depend on: all that a client may say about them but deadline, priority and its name."""
    said = [
        {name: value for name, value in asdict(generation).items() if name not in _FREE_FIELDS}
        for generation in generations
    ]
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).hexdigest()
