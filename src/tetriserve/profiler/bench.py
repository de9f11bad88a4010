"""Single tasks on an executor, for what measures or warms it up before an engine drives it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

from tetriserve.config import PoolConfig
from tetriserve.core.errors import TetriServeError
from tetriserve.core.events import Event, StartTask, States, TaskFailed, TaskFinished, Work
from tetriserve.core.plan import Task
from tetriserve.core.request import Lora, Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, ENCODE_IMAGE
from tetriserve.engine.pictures import InputPicture, put_pictures
from tetriserve.executor.protocol import Executor
from tetriserve.models.card import ModelCard
from tetriserve.models.ranks import encoders_of, ranks_of
from tetriserve.models.registry import dummy_request


@dataclass
class Bench:
    """Runs single tasks of a model on an executor and waits for them; it becomes the executor's subscriber.

    Ranks are called by their places among those that hold the model, from 0.

    purpose: for what, as the error of a task that fails says it.
    ranks: those that hold the model; `num_encoders` of them, the first, encode.
    encode_s, switch_s: what each encode took, and each task beyond its own time.
    """

    executor: Executor
    purpose: str
    ranks: Sequence[int]
    num_encoders: int
    encode_s: list[float] = field(default_factory=list)
    switch_s: list[float] = field(default_factory=list)
    _waiting: dict[int, asyncio.Future[TaskFinished]] = field(default_factory=dict)
    _work: dict[str, Work] = field(default_factory=dict)
    _busy: dict[int, asyncio.Lock] = field(default_factory=dict)
    _ids: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.executor.subscribe(self._on_event)

    @classmethod
    def of(cls, executor: Executor, purpose: str, card: ModelCard, pool: PoolConfig) -> Bench:
        """`pool`: the model's part, as everywhere here."""
        return cls(executor, purpose, ranks_of(card, pool), len(encoders_of(card, pool)))

    def request(self, card: ModelCard, shape: Shape, num_steps: int, lora: Lora | None = None) -> Request:
        """Without pictures, of which intake alone insists: the output alone takes part in its steps."""
        return self._request(card, shape, num_steps, [], lora)

    def request_with_picture(self, card: ModelCard, shape: Shape) -> Request:
        return self._request(card, shape, 1, [shape] * max(1, card.min_images))

    def _request(
        self, card: ModelCard, shape: Shape, num_steps: int, images: Sequence[Shape], lora: Lora | None = None
    ) -> Request:
        request = replace(dummy_request(card, shape, f"profile-{next(self._ids)}", num_steps, images), lora=lora)
        states = self._put_black(request) if images else {}
        self._work[request.request_id] = Work(request, 0, 0, states)
        return request

    def _put_black(self, request: Request) -> States:
        pictures = [InputPicture(shape, bytes(3 * shape.num_pixels)) for shape in request.images]
        return put_pictures(self.executor.states, request, pictures).states

    async def encode(self, request: Request, rank: int) -> None:
        """On `rank`, or where that may not encode on one that may."""
        finished = await self._run([request], ENCODE, (rank % self.num_encoders,))
        self.encode_s.append(finished.elapsed_s)

    async def denoise(self, requests: Sequence[Request], ranks: tuple[int, ...], num_steps: int) -> TaskFinished:
        return await self._run(requests, DENOISE, ranks, num_steps)

    async def encode_image(self, request: Request, ranks: tuple[int, ...]) -> TaskFinished:
        return await self._run([request], ENCODE_IMAGE, ranks)

    async def decode(self, request: Request, ranks: tuple[int, ...]) -> TaskFinished:
        return await self._run([request], DECODE, ranks)

    def forget(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.executor.forget(request.request_id)

    async def _run(
        self, requests: Sequence[Request], stage: str, ranks: tuple[int, ...], num_steps: int = 0
    ) -> TaskFinished:
        """The next task of a stage, whether those before it went all their way or not, once its ranks are idle."""
        async with AsyncExitStack() as stack:
            for rank in sorted(ranks):
                await stack.enter_async_context(self._busy.setdefault(rank, asyncio.Lock()))
            return await self._run_now(requests, stage, ranks, num_steps)

    async def _run_now(
        self, requests: Sequence[Request], stage: str, ranks: tuple[int, ...], num_steps: int
    ) -> TaskFinished:
        task_id = next(self._ids)
        there = tuple(self.ranks[place] for place in ranks)
        task = Task(tuple(request.request_id for request in requests), stage, there, num_steps)
        work = tuple(self._next_work(request, stage) for request in requests)
        future: asyncio.Future[TaskFinished] = asyncio.get_running_loop().create_future()
        self._waiting[task_id] = future
        started_at = time.monotonic()
        self.executor.start_task(StartTask(task_id, task, work))
        finished = await future
        for part, result in zip(work, finished.results, strict=True):
            after = part.trajectory.after(num_steps, is_stage_over=result.is_stage_over)
            states = {**part.states, stage: result.left}
            self._work[part.request.request_id] = Work(part.request, after.stage_index, after.stage_steps_done, states)
        self.switch_s.append(time.monotonic() - started_at - finished.elapsed_s)
        return finished

    def _next_work(self, request: Request, stage: str) -> Work:
        work = self._work[request.request_id]
        stage_index = [one.kind for one in request.stages].index(stage)
        return work if stage_index == work.stage_index else Work(request, stage_index, 0, work.states)

    def _on_event(self, event: Event) -> None:
        match event:
            case TaskFinished(task_id) | TaskFailed(task_id):
                future = self._waiting.pop(task_id)
            case _:
                return
        if future.done():
            return  # who waited for it was cancelled
        if isinstance(event, TaskFailed):
            future.set_exception(TetriServeError(f"while {self.purpose}, {event.message}"))
        else:
            future.set_result(event)
