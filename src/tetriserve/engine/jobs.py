"""Jobs: accepted work above a live engine, that outlives the connections of those who asked for it.

A job has a key of its client's, and is done once, whoever waits: calls with the same key get the same images. Here they
are kept in memory; `engine.journalled` keeps them across lives of the server.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from tetriserve.core.errors import KeyReused, RequestFailed
from tetriserve.core.events import FailureKind
from tetriserve.engine.intake import Generation
from tetriserve.engine.live import LiveEngine
from tetriserve.engine.progress import Admitted, GeneratedImage, Progress, Watcher
from tetriserve.journal import Key

_SWEEP_S = 60.0
_FREE_FIELDS = {"slo_s", "priority", "reject_infeasible", "request_id"}
"""What may differ between retries: no picture depends on it."""

Tell = Callable[[int, Progress | GeneratedImage], None]


class Job:
    """Images that several callers wait for, and that are made whether or not anybody does.

    `run` begins it; callers come and go.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[list[GeneratedImage]] | None = None
        self._watchers: list[Watcher] = []
        self._latest: dict[int, Progress | GeneratedImage] = {}

    def run(self, making: Coroutine[Any, Any, list[GeneratedImage]], on_end: Callable[[], None]) -> None:
        """Begin; `on_end` is called when it ends, one way or another."""
        self._task = asyncio.create_task(making)
        self._task.add_done_callback(_retrieve)
        self._task.add_done_callback(lambda task: on_end())

    async def images(self, watch: Watcher | None = None) -> list[GeneratedImage]:
        """The images once they are there; `watch` hears where each stands, and then of every change.

        Cancelling the call cancels nothing but the call.

        Raises: what the work raised.
        """
        assert self._task is not None, "it was begun"
        if watch is not None:
            for number, update in self._latest.items():
                watch(number, update)
            self._watchers.append(watch)
        try:
            return await asyncio.shield(self._task)
        finally:
            if watch is not None:
                self._watchers.remove(watch)

    def tell(self, number: int, update: Progress | GeneratedImage) -> None:
        self._latest[number] = update
        for watch in self._watchers:
            watch(number, update)

    async def wait(self) -> None:
        """Until it has ended, one way or another."""
        if self._task is not None:
            await asyncio.wait({self._task})


@dataclass
class Known:
    """What a key stands for.

    name: of its entry in a journal; None until it is accepted, and without one.
    ended_at: unix time at which its images were all there, or it had failed for good.
    job: None if it does not run, and its images are not in memory.
    """

    digest: str
    name: str | None = None
    ended_at: float | None = None
    has_failed: bool = False
    job: Job | None = None


class Jobs:
    """All jobs of `engine`, of the past `result_ttl_s` seconds and unfinished. Lives on the engine's event loop.

    wall_clock: unix time, by which results are kept.
    """

    is_durable = False
    """Whether jobs outlive the server."""

    def __init__(
        self, engine: LiveEngine, *, result_ttl_s: float = 3600.0, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self.engine = engine
        self._result_ttl_s = result_ttl_s
        self._wall_clock = wall_clock
        self._known: dict[Key, Known] = {}
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

    def is_known(self, key: Key) -> bool:
        """Whether a call with `key` joins what is there already."""
        return self._find(key) is not None

    def call(self, key: Key, generations: Sequence[Generation], held: ExitStack | None = None) -> Job:
        """What `key` stands for: begun now, running already, or over.

        `held` is closed when new work ends, or at once if there is none.

        Raises:
            KeyReused: it stands for other pictures.
        """
        digest = digest_of(generations)
        known = self._find(key)
        if known is None:
            known = self._known[key] = Known(digest)
            job = Job()
            return self._begin(known, job, self._execute(key, known, generations, job.tell), held)
        if held is not None:
            held.close()
        if known.digest != digest:
            raise KeyReused("this key stands for other pictures already; a new request needs a new one")
        return known.job or self._reopen(key, known, generations)

    def count(self) -> Counter[str]:
        """Keys by state: open, finished, failed."""
        return Counter(
            "open" if known.ended_at is None else "failed" if known.has_failed else "finished"
            for known in self._known.values()
        )

    def _begin(
        self,
        known: Known,
        job: Job,
        making: Coroutine[Any, Any, list[GeneratedImage]],
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
        job = Job()
        return self._begin(known, job, self._execute(key, known, generations, job.tell))

    def _rest(self, known: Known) -> None:
        """Its job has ended, and goes unless it has the answer."""
        if known.ended_at is None:
            known.job = None

    async def _execute(
        self, key: Key, known: Known, generations: Sequence[Generation], tell: Tell
    ) -> list[GeneratedImage]:
        """New work. A refusal leaves nothing, so that the key can be used again."""
        try:
            admitted = await self.engine.admit(generations, self._watch(range(len(generations)), tell))
        except BaseException:
            self._forget(key, known)
            raise
        return await self._see_through(known, {}, dict(enumerate(admitted)), tell)

    async def _see_through(
        self, known: Known, images: dict[int, GeneratedImage], admitted: Mapping[int, Admitted], tell: Tell
    ) -> list[GeneratedImage]:
        """Keep each image as it comes, and tell of it only then.

        What ends otherwise than by an image or a failure of its own stays open: the next call goes on with it. Lost
        workers, a lack of memory and a failed scheduler are not its own: it would succeed on a host that is well.
        """

        async def keep(number: int, client: Admitted) -> None:
            image = await client.image
            await self._keep(image)
            images[number] = image
            tell(number, image)

        try:
            await asyncio.gather(*(keep(number, client) for number, client in admitted.items()))
        except RequestFailed as error:
            self.engine.leave([*admitted.values()])
            if error.kind is FailureKind.STEP:
                await self._fail(known, error)
            raise
        finally:
            self.engine.leave([*admitted.values()])
        if known.ended_at is None:
            known.ended_at = self._wall_clock()
        return [images[number] for number in sorted(images)]

    async def _keep(self, image: GeneratedImage) -> None:
        """Have an image last before it is given away."""

    async def _fail(self, known: Known, error: RequestFailed) -> None:
        known.ended_at, known.has_failed = self._wall_clock(), True

    def _watch(self, numbers: Sequence[int], tell: Tell) -> Watcher:
        """Passes on what the engine says, but for images: those are told of when they are kept."""

        def watch(index: int, update: Progress | GeneratedImage) -> None:
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
        return known.ended_at is not None and now > known.ended_at + self._result_ttl_s

    def _expire(self) -> None:
        now = self._wall_clock()
        for key, known in [*self._known.items()]:
            if self._is_over(known, now):
                self._forget(key, known)

    def _forget(self, key: Key, known: Known) -> None:
        """Free the key."""
        if self._known.get(key) is known:
            del self._known[key]

    def _begin_sweeping(self) -> None:
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(_SWEEP_S, self._result_ttl_s / 4))
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


def _retrieve(task: asyncio.Task[list[GeneratedImage]]) -> None:
    """All callers may have left before it failed: asyncio would complain that nobody heard of it."""
    if not task.cancelled():
        task.exception()
