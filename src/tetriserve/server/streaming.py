"""Images as server-sent events: OpenAI's previews and finished images, and between them how they get on.

An error before the first event is an ordinary answer; afterwards it is an event `error` with the same envelope.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from tetriserve.core.errors import TetriServeError
from tetriserve.engine import Generated, GeneratedImage, Progress
from tetriserve.server.disconnect import ClientGone, unless_gone
from tetriserve.server.errors import response_to
from tetriserve.server.exchange import CLIENT_CLOSED_REQUEST, Exchange
from tetriserve.server.idempotency import MakeImages
from tetriserve.server.images import base64_of, encode, encoding_of, preview_encoding, schedule, usage_of
from tetriserve.server.previews import PreviewMaker
from tetriserve.server.schemas import CompletedEvent, PartialImageEvent, ProgressEvent
from tetriserve.server.work import ImageWork
from tetriserve.workload.outcome import Outcome

MEDIA_TYPE = "text/event-stream"
_EVENT_SCHEMA = {
    "type": "object",
    "description": "One server-sent event; `data` is JSON.",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}

STREAM_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The images; with `stream`, events that lead to them.",
        "content": {MEDIA_TYPE: {"schema": _EVENT_SCHEMA}},
    }
}
"""For `/openapi.json`."""


class EventTypes(NamedTuple):
    """What events are called: OpenAI has two words for the same."""

    progress: Literal["image_generation.progress", "image_edit.progress"]
    partial_image: Literal["image_generation.partial_image", "image_edit.partial_image"]
    completed: Literal["image_generation.completed", "image_edit.completed"]


GENERATION = EventTypes("image_generation.progress", "image_generation.partial_image", "image_generation.completed")
EDIT = EventTypes("image_edit.progress", "image_edit.partial_image", "image_edit.completed")

StreamEvent = ProgressEvent | PartialImageEvent | CompletedEvent
Update = tuple[int, Progress | Generated]


class Updates:
    """Images that are being made, and what is heard of them until all are there. Whoever opens it closes it."""

    def __init__(self, make_images: MakeImages) -> None:
        self._queue: asyncio.Queue[Update | None] = asyncio.Queue()
        self._first: Update | None = None
        watched = make_images(lambda number, update: self._queue.put_nowait((number, update)))
        self._working = asyncio.create_task(watched)
        self._working.add_done_callback(lambda working: self._queue.put_nowait(None))

    @classmethod
    async def open(cls, make_images: MakeImages) -> Updates:
        """
        Raises: as `make_images`, if the images are not admitted.
        """
        updates = cls(make_images)
        try:
            first = await updates._queue.get()
        except asyncio.CancelledError:
            await updates.close()
            raise
        if first is None:
            updates._working.result()
        updates._first = first
        return updates

    async def __aiter__(self) -> AsyncIterator[Update]:
        """
        Raises: as `make_images`, if it ends without an image.
        """
        update = self._first
        while update is not None:
            yield update
            update = await self._queue.get()
        self._working.result()

    async def close(self) -> None:
        """Nobody listens any more: what is not finished is cancelled."""
        self._working.cancel()
        await asyncio.gather(self._working, return_exceptions=True)


class ImageEvents:
    """Updates of one call's images as events."""

    def __init__(self, work: ImageWork, types: EventTypes) -> None:
        self._types = types
        self._engine = work.engine
        self._card = work.card
        self._encoding = encoding_of(work.body)
        self._preview_encoding = preview_encoding(self._encoding)
        self._num_previews_wanted = work.body.partial_images or 0
        self._max_side = work.service.api.preview_side
        self._warnings = work.warnings
        self._makers: dict[int, PreviewMaker] = {}
        self._num_previews: Counter[int] = Counter()

    async def of(self, number: int, update: Progress | Generated) -> AsyncIterator[StreamEvent]:
        """The events that one update of image `number` leads to."""
        if isinstance(update, GeneratedImage):
            yield await asyncio.to_thread(self._completed, number, update)
        if not isinstance(update, Progress):
            return
        yield await self._progress(number, update)
        if update.latents is not None and self._num_previews_wanted:
            preview = await asyncio.to_thread(self._preview, number, update)
            if preview is not None:
                yield preview

    async def _progress(self, number: int, update: Progress) -> ProgressEvent:
        request = update.request
        finish_s = (await self._engine.forecast()).finish_s.get(request.request_id)
        return ProgressEvent(
            type=self._types.progress,
            image_index=number,
            stage=update.stage,
            step=update.steps_done,
            num_steps=request.num_steps,
            degree=update.degree,
            predicted_finish_ms=None if finish_s is None else max(0.0, round((finish_s - self._engine.now) * 1000, 3)),
        )

    def _preview(self, number: int, update: Progress) -> PartialImageEvent | None:
        if number not in self._makers:
            self._makers[number] = PreviewMaker(self._engine, update.request, self._num_previews_wanted, self._max_side)
        pixels = self._makers[number].make(update)
        if pixels is None:
            return None
        self._num_previews[number] += 1
        return PartialImageEvent(
            type=self._types.partial_image,
            b64_json=base64_of(encode(pixels, self._preview_encoding)),
            partial_image_index=self._num_previews[number] - 1,
            image_index=number,
            created_at=int(time.time()),
            size=f"{pixels.shape[1]}x{pixels.shape[0]}",
            output_format=self._preview_encoding.format,
        )

    def _completed(self, number: int, image: GeneratedImage) -> CompletedEvent:
        return CompletedEvent(
            type=self._types.completed,
            b64_json=base64_of(encode(image.pixels, self._encoding)),
            seed=image.outcome.request.seed,
            schedule=schedule(image.outcome),
            image_index=number,
            created_at=int(time.time()),
            size=str(image.outcome.request.shape),
            output_format=self._encoding.format,
            usage=usage_of(self._card, [image]),
            warnings=self._warnings or None,
        )


class ImageStream(Response):
    """The answer: every event of `updates`. When it ends, one way or another, so do they and what is `pending`."""

    media_type = MEDIA_TYPE

    def __init__(self, request: Request, events: ImageEvents, updates: Updates, pending: ExitStack) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self._request = request
        self._exchange: Exchange = request.state.exchange
        self._events = events
        self._updates = updates
        self._pending = pending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(self._request, self._send_all(send))
        except ClientGone:
            self._exchange.status = CLIENT_CLOSED_REQUEST
        finally:
            with self._pending:
                await self._updates.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        outcomes: list[Outcome] = []
        try:
            async for number, update in self._updates:
                if isinstance(update, GeneratedImage):
                    outcomes.append(update.outcome)
                async for event in self._events.of(number, update):
                    await _send_event(send, event.type, _json_of(event))
            self._exchange.note_outcomes(outcomes)
        except TetriServeError as error:
            response = response_to(error)
            self._exchange.note_error(response)
            self._exchange.status = response.status_code
            await _send_event(send, "error", bytes(response.body).decode())
        await send({"type": "http.response.body", "body": b""})


def _json_of(event: StreamEvent) -> str:
    """A finished image leaves out what is null, as plain answers do; in progress a null is a fact."""
    return event.model_dump_json(exclude_none=isinstance(event, CompletedEvent))


async def _send_event(send: Send, name: str, data: str) -> None:
    await send({"type": "http.response.body", "body": f"event: {name}\ndata: {data}\n\n".encode(), "more_body": True})
