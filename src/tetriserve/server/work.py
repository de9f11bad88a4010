"""One call for images, whatever its route: checked, admitted, made, and put into files."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Header, Request

from tetriserve.config import ApiConfig
from tetriserve.engine import GeneratedImage, Generation, LiveEngine
from tetriserve.engine.pictures import InputPicture
from tetriserve.models.card import ModelCard
from tetriserve.server.access import Caller
from tetriserve.server.compat import ignored_names, picture_warnings
from tetriserve.server.disconnect import unless_gone
from tetriserve.server.exchange import Exchange
from tetriserve.server.generations import generations_of, size_for_log
from tetriserve.server.idempotency import MakeImages, begin
from tetriserve.server.images import base64_of, encode_all, encoding_of, schedule, usage_of
from tetriserve.server.links import Links
from tetriserve.server.pictures import decode_all
from tetriserve.server.schemas import ClientId, ImageData, ImagesRequest, ImagesResponse
from tetriserve.server.slot import EngineSlot

SloHeader = Annotated[float | None, Header(alias="X-SLO-Ms", description="As `slo_ms` in the body, which wins.")]
IdHeader = Annotated[
    ClientId | None, Header(alias="X-Request-Id", description="As `request_id` in the body, which wins.")
]


@dataclass(frozen=True)
class Service:
    """What routes for images share: the engine's slot, how requests are read, and files kept for a while.

    decoding: a turn to decode pictures, which takes a few times the bytes of their pixels.
    """

    slot: EngineSlot
    api: ApiConfig
    links: Links
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))

    async def work_with(
        self,
        request: Request,
        body: ImagesRequest,
        slo_ms: float | None,
        files: Sequence[bytes],
        param: str,
        warnings: Sequence[str] = (),
    ) -> ImageWork:
        """As `work_of`, with the pictures in `files`, which the client calls `param`.

        Raises:
            InvalidRequest, NotReady: it is not served.
        """
        self.slot.require().models.called(body.model, num_images=len(files)).pictures.check_number(len(files))
        pictures: Sequence[InputPicture] = ()
        if files:
            async with self.decoding:
                pictures = await asyncio.to_thread(decode_all, files, param)
        return self.work_of(request, body, slo_ms, warnings, pictures)

    def work_of(
        self,
        request: Request,
        body: ImagesRequest,
        slo_ms: float | None,
        warnings: Sequence[str] = (),
        pictures: Sequence[InputPicture] = (),
    ) -> ImageWork:
        """What is asked for, checked. `warnings`: what else was ignored in it. `pictures` come with the prompt. The log
        line learns of it.

        Raises:
            InvalidRequest, NotReady: it is not served.
        """
        exchange: Exchange = request.state.exchange
        exchange.request_id = body.request_id or exchange.request_id
        exchange.facts |= {"size": size_for_log(body), "n": body.n or 1}
        if pictures:
            sizes = ",".join(str(picture.shape) for picture in pictures)
            exchange.facts |= {"pictures": len(pictures), "picture_sizes": sizes}
        engine = self.slot.require()
        intake, model = engine.models.chosen(body.model, num_images=len(pictures))
        card = intake.card
        if engine.models.are_several:
            exchange.facts["model"] = card.name
        generations = generations_of(body, model, card, slo_ms, pictures)
        all_warnings = [*warnings, *picture_warnings(body, self.api.compat)]
        if body.response_format == "url":
            self.links.check_served()
        if all_warnings:
            exchange.facts["ignored"] = ignored_names(all_warnings)
        return ImageWork(self, request, body, engine, card, generations, all_warnings)


@dataclass(frozen=True)
class ImageWork:
    """One call's images. `card` is of the model that makes them, `warnings` say what was ignored."""

    service: Service
    request: Request
    body: ImagesRequest
    engine: LiveEngine
    card: ModelCard
    generations: list[Generation]
    warnings: list[str]

    @property
    def exchange(self) -> Exchange:
        exchange: Exchange = self.request.state.exchange
        return exchange

    def begin(self, key: str | None, pending: ExitStack) -> MakeImages:
        """See `idempotency.begin`."""
        client: Caller = self.request.state.client
        make_images = begin(self.service.slot, client, self.generations, key, pending)
        self.exchange.facts["image_ids"] = ",".join(generation.request_id or "" for generation in self.generations)
        return make_images

    async def images(self, key: str | None, pending: ExitStack) -> list[GeneratedImage]:
        """The images, once all are there. `key`, `pending`: see `idempotency.begin`.

        Raises:
            ClientGone: the client closed the connection.
        """
        images = await unless_gone(self.request, self.begin(key, pending)(None))
        self.exchange.facts["image_ids"] = ",".join(image.outcome.request.request_id for image in images)
        self.exchange.note_outcomes([image.outcome for image in images])
        return images

    async def response(self, images: Sequence[GeneratedImage]) -> ImagesResponse:
        """The answer of OpenAI's images API; the images are kept if URLs are asked for."""
        encoding, card = encoding_of(self.body), self.card
        files = await asyncio.to_thread(encode_all, images, encoding)
        urls: Sequence[str | None] = [None] * len(files)
        texts: Sequence[str | None] = urls
        if self.body.response_format == "url":
            address = str(self.request.base_url).rstrip("/")
            urls = [address + self.service.links.put(file, encoding.media_type) for file in files]
        else:
            texts = await asyncio.to_thread(lambda: [base64_of(file) for file in files])
        return ImagesResponse(
            id=self.exchange.request_id,
            created=int(time.time()),
            model=card.name,
            size=str(images[0].outcome.request.shape),
            output_format=encoding.format,
            data=[
                ImageData(b64_json=text, url=url, seed=image.outcome.request.seed, schedule=schedule(image.outcome))
                for text, url, image in zip(texts, urls, images, strict=True)
            ],
            usage=usage_of(card, images),
            user=self.body.user,
            safety_identifier=self.body.safety_identifier,
            warnings=self.warnings or None,
        )
