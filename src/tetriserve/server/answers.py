"""How a call for images is answered on the routes of OpenAI's images API: with all of them, or with a stream."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from fastapi import Response

from tetriserve.server.disconnect import ClientGone
from tetriserve.server.exchange import CLIENT_CLOSED_REQUEST
from tetriserve.server.streaming import STREAM_RESPONSES, EventTypes, ImageEvents, ImageStream, Updates
from tetriserve.server.work import ImageWork

__all__ = ["STREAM_RESPONSES", "answer"]


async def answer(work: ImageWork, key: str | None, types: EventTypes) -> Response:
    """The answer to `work`, under the idempotency key `key` if there is one. `types`: of the events of a stream.

    Raises: what the images' admission raises, and without a stream their failure.
    """
    with ExitStack() as pending:
        if work.body.stream:
            updates = await Updates.open(work.begin(key, pending))
            return ImageStream(work.request, ImageEvents(work, types), updates, pending.pop_all())
        try:
            images = await work.images(key, pending)
        except ClientGone:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        whole = await work.response(images)
        text = await asyncio.to_thread(whole.model_dump_json, exclude_none=True)
    return Response(text, media_type="application/json")
