"""Images for one call: made for it and given up with it, or, under an idempotency key, made once and kept.

Videos are always made once and kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any

from fastapi import Header

from tetriserve.core.errors import InvalidRequest
from tetriserve.engine import GeneratedImage, Generation, Jobs, Video, Watcher
from tetriserve.journal import Key, VideoFacts
from tetriserve.server.access import Caller
from tetriserve.server.schemas import ClientId
from tetriserve.server.slot import EngineSlot

HEADER = "Idempotency-Key"

KeyHeader = Annotated[
    ClientId | None,
    Header(
        alias=HEADER,
        description="The client's own name for this work: it is done once, whatever becomes of the connection or the "
        "server, and the same call under the same key gets the same images.",
    ),
]
MakeImages = Callable[[Watcher | None], Coroutine[Any, Any, list[GeneratedImage]]]


def begin(
    slot: EngineSlot, client: Caller, generations: Sequence[Generation], key: str | None, pending: ExitStack
) -> MakeImages:
    """How to get the images. `pending` counts them as the client's for as long as the call lasts; work under a key is
    counted for as long as it goes on, whoever waits.

    Raises:
        InvalidRequest: there is a key and no journal, or the key stands for other pictures.
        OverLimit: the client has used up what it may ask for.
    """
    num_images, now = len(generations), time.monotonic()
    if key is None:
        pending.enter_context(client.allowance.admitted(num_images, now))
        return partial(slot.require().generate_all, generations)
    jobs = slot.require_jobs()
    _check_durable(jobs)
    name = Key(client.tenant, key)
    if jobs.is_known(name):
        client.allowance.use_rate(num_images, now)
        return jobs.call(name, generations).images
    with ExitStack() as held:
        held.enter_context(client.allowance.admitted(num_images, now))
        return jobs.call(name, generations, held.pop_all()).images


def begin_video(slot: EngineSlot, client: Caller, generation: Generation, facts: VideoFacts, key: str | None) -> Video:
    """The job of a video, which counts as the client's for as long as it goes on; see `begin`. It may not be admitted
    yet.

    Raises: as `begin`.
    """
    jobs, now = slot.require_jobs(), time.monotonic()
    if key is not None:
        _check_durable(jobs)
    name = Key(client.tenant, key or facts.id)
    if jobs.is_known(name):
        client.allowance.use_rate(1, now)
        return jobs.call_video(name, generation, facts)
    with ExitStack() as held:
        held.enter_context(client.allowance.admitted(1, now))
        return jobs.call_video(name, generation, facts, held.pop_all())


def _check_durable(jobs: Jobs) -> None:
    if not jobs.is_durable:
        raise InvalidRequest(f"{HEADER} needs a server with a journal: tetriserve serve --journal DIR", HEADER)
