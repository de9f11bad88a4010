"""Jobs: accepted work above a live engine, that outlives the connections of those who asked for it.

A job has a key of its client's, and is done once, whoever waits: calls with the same key get the same images. A video
is always a job, with an id by which its client asks for it. Here images are kept in memory, and videos in temporary
files; `engine.journalled` keeps them across lives of the server.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any, BinaryIO

from tetriserve.core.errors import (
    KeyReused,
    RequestFailed,
    ShuttingDown,
    TetriServeError,
    UnknownVideo,
    VideoFailed,
    VideoNotReady,
)
from tetriserve.core.events import FailureKind
from tetriserve.engine.intake import Generation
from tetriserve.engine.job import Job, Known, Tell
from tetriserve.engine.live import LiveEngine
from tetriserve.engine.progress import Admitted, Generated, GeneratedVideo, Progress, StoredFile, Watcher
from tetriserve.engine.videos import MAX_BYTES, Video, VideoFiles, VideoStatus, remove
from tetriserve.journal import Key, VideoFacts
from tetriserve.logs import fields
from tetriserve.models.video_file import VideoFile

logger = logging.getLogger(__name__)

_SWEEP_S = 60.0
_FREE_FIELDS = {"slo_s", "priority", "reject_infeasible", "request_id"}
"""What may differ between retries: no picture depends on it."""


class Jobs:
    """All jobs of `engine`, of the past `result_ttl_s` seconds and unfinished. Lives on the engine's event loop.

    wall_clock: unix time, by which results are kept.
    max_video_bytes: of the files of all finished videos; the oldest go before their time.
    """

    is_durable = False
    """Whether jobs outlive the server."""

    def __init__(
        self,
        engine: LiveEngine,
        *,
        result_ttl_s: float = 3600.0,
        wall_clock: Callable[[], float] = time.time,
        max_video_bytes: int = MAX_BYTES,
    ) -> None:
        self.engine = engine
        self.result_ttl_s = result_ttl_s
        self.max_video_bytes = max_video_bytes
        self._wall_clock = wall_clock
        self._known: dict[Key, Known] = {}
        self._videos: dict[tuple[str, str], Video] = {}
        self._files = VideoFiles()
        self._sweeper: asyncio.Task[None] | None = None

    async def stop(self, timeout_s: float = 0.0) -> None:
        """Stop the engine, and let jobs end that it has ended. May be called again."""
        await self.engine.stop(timeout_s)
        await self._close()

    async def _close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        for known in list(self._known.values()):
            if known.job is not None:
                await known.job.wait()
        await asyncio.to_thread(self._files.close)

    def is_known(self, key: Key) -> bool:
        """Whether a call with `key` joins what is there already."""
        return self._find(key) is not None

    def call(self, key: Key, generations: Sequence[Generation], held: ExitStack | None = None) -> Job:
        """What `key` stands for: begun now, running already, or over.

        `held` is closed when new work ends, or at once if there is none.

        Raises:
            KeyReused: it stands for other pictures.
        """
        known = self._find(key)
        if known is None:
            known = self._known[key] = Known(digest_of(generations))
            return self._start(key, known, generations, held)
        self._join(known, generations, held)
        return known.job or self._reopen(key, known, generations)

    def call_video(self, key: Key, generation: Generation, facts: VideoFacts, held: ExitStack | None = None) -> Video:
        """As `call`, of a video, which has an id of its own from its acceptance on: see `Job.admitted`."""
        known = self._find(key)
        if known is None:
            video = Video(digest=digest_of([generation]), key=key, facts=facts, created_at=self._wall_clock())
            self._add(video)
            self._start(key, video, [generation], held)
            return video
        self._join(known, [generation], held)
        assert isinstance(known, Video), "digests of videos are not those of images"
        self._go_on(known)
        return known

    def video(self, tenant: str, video_id: str) -> Video:
        """One that was accepted from this client, and has not expired.

        Raises:
            UnknownVideo: there is none.
        """
        video = self._videos.get((tenant, video_id))
        if video is None or video.request is None or video.is_deleted or self._find(video.key) is not video:
            raise UnknownVideo(
                f"there is no video {video_id[:80]!r}; finished ones are kept for {self.result_ttl_s:g} s, and at most "
                f"{self.max_video_bytes} bytes of them"
            )
        self._go_on(video)
        return video

    def videos(self, tenant: str) -> list[Video]:
        """All of this client's, in order of their acceptance."""
        self._expire()
        own = [
            video
            for (owner, _), video in self._videos.items()
            if owner == tenant and video.request is not None and not video.is_deleted
        ]
        return sorted(own, key=lambda video: (video.created_at, video.facts.id))

    async def delete_video(self, video: Video) -> None:
        """Cancel it if it is not finished, and forget it.

        Raises:
            JournalError: it may be there again after a restart.
        """
        video.is_deleted = True
        try:
            if video.job is not None:
                await video.job.cancel()
            await self._drop(video)
        except BaseException:
            video.is_deleted = False
            raise
        self._forget(video.key, video)

    async def open_video(self, video: Video, *, is_thumbnail: bool = False) -> tuple[BinaryIO, StoredFile]:
        """A file of a finished video, to be read from its beginning; it can be read to its end whatever becomes of the
        video.

        Raises:
            VideoNotReady: it was damaged, and is made again.
            VideoFailed: it is lost.
            UnknownVideo: it was deleted meanwhile.
        """
        stored = video.stored
        assert stored is not None, "it is finished"
        file = stored.thumbnail if is_thumbnail else stored.video
        opened = await asyncio.to_thread(self._open, file)
        if opened is not None:
            return opened, file
        if self.video(video.key.tenant, video.facts.id).stored is stored:  # it is not deleted meanwhile
            self._lose(video)
        raise VideoNotReady(f"video {video.facts.id} is made again")

    def count(self) -> Counter[str]:
        """Keys by state: open, finished, failed."""
        return Counter(
            "failed" if known.failure is not None else "open" if known.ended_at is None else "finished"
            for known in self._known.values()
        )

    def _start(self, key: Key, known: Known, generations: Sequence[Generation], held: ExitStack | None) -> Job:
        """Begin new work."""
        job = Job(known.hear)
        return self._begin(known, job, self._execute(key, known, generations, job.tell), held)

    def _join(self, known: Known, generations: Sequence[Generation], held: ExitStack | None) -> None:
        """A call for what there is already.

        Raises:
            KeyReused: it is not the same.
        """
        if held is not None:
            held.close()
        if known.digest != digest_of(generations):
            raise KeyReused("this key stands for other pictures already; a new request needs a new one")

    def _begin(
        self,
        known: Known,
        job: Job,
        making: Coroutine[Any, Any, list[Generated]],
        held: ExitStack | None = None,
    ) -> Job:
        def rest() -> None:
            self._rest(known)
            if held is not None:
                held.close()

        known.job = job
        job.run(making, rest)
        self._begin_sweeping()
        return job

    def _reopen(self, key: Key, known: Known, generations: Sequence[Generation]) -> Job:
        """Go on with work that ended without an answer, or whose answer is not in memory."""
        return self._start(key, known, generations, None)

    def _go_on(self, video: Video) -> None:
        """Go on with a video that neither runs nor is finished. Without a journal there is none."""

    def _rest(self, known: Known) -> None:
        """Its job has ended, and goes unless it has the answer."""
        if isinstance(known, Video):
            self._rest_video(known)
        if known.ended_at is None:
            known.job = None

    def _rest_video(self, video: Video) -> None:
        """Its job has ended. Whatever ended it is a failure that its client hears of: no call goes on with the work.

        A stop of the server is none: with a journal the next life goes on.
        """
        error = None if video.job is None or not video.job.is_admitted else video.job.error
        if video.ended_at is None and error is not None and not isinstance(error, ShuttingDown):
            if not isinstance(error, TetriServeError):
                logger.error("video %s failed unexpectedly", video.facts.id, exc_info=error)
                error = RequestFailed(f"the server failed: {type(error).__name__}")
            video.failure, video.ended_at = error, self._wall_clock()
        if video.made is not None:
            self._make_room()

    async def _execute(self, key: Key, known: Known, generations: Sequence[Generation], tell: Tell) -> list[Generated]:
        """New work. A refusal leaves nothing, so that the key can be used again."""
        try:
            admitted = await self.engine.admit(generations, self._watch(range(len(generations)), tell))
        except BaseException:
            self._forget(key, known)
            raise
        return await self._see_through(known, {}, dict(enumerate(admitted)), tell)

    async def _see_through(
        self, known: Known, made: dict[int, Generated], admitted: Mapping[int, Admitted], tell: Tell
    ) -> list[Generated]:
        """Keep each image as it comes, and tell of it only then.

        What ends otherwise than by an image or a failure of its own stays open: the next call goes on with it. Lost
        workers, a lack of memory and a failed scheduler are not its own: it would succeed on a host that is well.
        """

        async def keep(number: int, client: Admitted) -> None:
            made[number] = await self._keep(await client.made)
            tell(number, made[number])

        try:
            await asyncio.gather(*(keep(number, client) for number, client in admitted.items()))
        except RequestFailed as error:
            self.engine.leave([*admitted.values()])
            if _is_final(known, error):
                await self._fail(known, error)
            raise
        finally:
            self.engine.leave([*admitted.values()])
        if known.ended_at is None:
            stored_at = known.stored.stored_at if isinstance(known, Video) and known.stored is not None else None
            known.ended_at = self._wall_clock() if stored_at is None else stored_at  # as the next life reads it
        return [made[number] for number in sorted(made)]

    async def _keep(self, made: Generated) -> Generated:
        """Have an output last before it is given away; a video is on disk then.

        Raises:
            RequestFailed: there is no room for it.
        """
        if not isinstance(made, GeneratedVideo):
            return made
        assert isinstance(made.content, VideoFile), "it was just made"
        stored = await self._files.keep(made.outcome.request.request_id, made.content)
        return GeneratedVideo(stored, made.outcome)

    async def _fail(self, known: Known, error: RequestFailed) -> None:
        known.ended_at, known.failure = self._wall_clock(), error

    def _watch(self, numbers: Sequence[int], tell: Tell) -> Watcher:
        """Passes on what the engine says, but for images: those are told of when they are kept."""

        def watch(index: int, update: Progress | Generated) -> None:
            if isinstance(update, Progress):
                self._note(update)
                tell(numbers[index], update)

        return watch

    def _note(self, progress: Progress) -> None:
        """A request of a job has come so far."""

    def _find(self, key: Key) -> Known | None:
        known = self._known.get(key)
        if known is not None and self._is_over(known, self._wall_clock()):
            self._forget(key, known)
            return None
        return known

    def _is_over(self, known: Known, now: float) -> bool:
        return known.ended_at is not None and now > known.ended_at + self.result_ttl_s

    def _expire(self) -> None:
        now = self._wall_clock()
        for key, known in [*self._known.items()]:
            if self._is_over(known, now):
                self._forget(key, known)

    def _forget(self, key: Key, known: Known) -> None:
        """Free the key."""
        if self._known.get(key) is known:
            del self._known[key]
        if isinstance(known, Video) and self._videos.get(_address(known)) is known:
            del self._videos[_address(known)]
            self._remove_files(known)

    def _add(self, video: Video) -> None:
        self._known[video.key] = self._videos[_address(video)] = video

    def _remove_files(self, video: Video) -> None:
        if video.stored is not None:
            remove(video.stored)

    async def _drop(self, video: Video) -> None:
        """Have it last that there is no such video."""

    def _open(self, file: StoredFile) -> BinaryIO | None:
        """None if it is not there, or not as it was written. Runs in a thread."""
        try:
            return file.path.open("rb")
        except OSError:
            return None

    def _lose(self, video: Video) -> None:
        """A finished video's file is not there.

        Raises:
            VideoFailed: it is not made again.
        """
        video.lose()
        video.failure, video.ended_at = RequestFailed("its file was removed from the server"), self._wall_clock()
        raise VideoFailed(f"video {video.facts.id} is lost: {video.failure}")

    def _make_room(self) -> None:
        """Forget the oldest finished videos, all but the latest, until the others have no more than their bytes."""
        finished = [video for video in self._videos.values() if video.status is VideoStatus.COMPLETED]
        num_bytes = sum(video.num_bytes for video in finished)
        for video in sorted(finished, key=lambda video: video.ended_at or 0.0)[:-1]:
            if num_bytes <= self.max_video_bytes:
                break
            num_bytes -= video.num_bytes
            logger.info(
                "video %s is given up before its time: all have more than %d bytes",
                video.facts.id, self.max_video_bytes, extra=fields(image_ids=video.facts.id),
            )  # fmt: skip
            self._forget(video.key, video)

    def _begin_sweeping(self) -> None:
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(_SWEEP_S, self.result_ttl_s / 4))
            await self._clear_up()

    async def _clear_up(self) -> None:
        self._expire()


def digest_of(generations: Sequence[Generation]) -> str:
    """Of what pictures depend on: all that a client may say about them but deadline, priority and its name."""
    said = []
    for generation in generations:
        fields = asdict(replace(generation, images=()))
        fields |= {"images": [image.digest for image in generation.images]}
        for name in ("images", "strength", "lora", "model", "video"):  # which journals of earlier versions do not know
            if not fields[name]:
                del fields[name]
        said.append({name: value for name, value in fields.items() if name not in _FREE_FIELDS})
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).hexdigest()


def _is_final(known: Known, error: RequestFailed) -> bool:
    """Whether a failure is the answer for as long as the key is known: it would not succeed on a host that is well.

    Of a video any failure of a task is. Its client asks for its status, and does not call again with the same work.
    """
    return error.kind is FailureKind.STEP or (isinstance(known, Video) and error.kind is not None)


def _address(video: Video) -> tuple[str, str]:
    return video.key.tenant, video.facts.id
