"""OpenAI's routes: images and models."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from tetriserve.engine import GeneratedImage, LiveEngine
from tetriserve.server.access import Caller
from tetriserve.server.disconnect import ClientGone, unless_gone
from tetriserve.server.errors import KEY_RESPONSES, RESPONSES, envelope
from tetriserve.server.exchange import CLIENT_CLOSED_REQUEST, Exchange
from tetriserve.server.generations import generations_of, size_for_log
from tetriserve.server.idempotency import KeyHeader, begin
from tetriserve.server.images import encoding_of, image_data
from tetriserve.server.schemas import (
    ClientId,
    ImagesRequest,
    ImagesResponse,
    ModelList,
    ModelObject,
    Reproducibility,
    SizeRange,
)
from tetriserve.server.slot import EngineSlot
from tetriserve.server.streaming import STREAM_RESPONSES, ImageEvents, ImageStream, Updates

SloHeader = Annotated[float | None, Header(alias="X-SLO-Ms", description="As `slo_ms` in the body, which wins.")]
IdHeader = Annotated[
    ClientId | None, Header(alias="X-Request-Id", description="As `request_id` in the body, which wins.")
]


def openai_router(slot: EngineSlot) -> APIRouter:
    router = APIRouter(responses=RESPONSES)
    created = int(time.time())

    @router.post("/v1/images/generations", response_model=ImagesResponse, responses=STREAM_RESPONSES | KEY_RESPONSES)
    async def generate_images(
        request: Request,
        body: ImagesRequest,
        x_slo_ms: SloHeader = None,
        x_request_id: IdHeader = None,
        idempotency_key: KeyHeader = None,
    ) -> Response:
        """Make `n` images of a prompt, each by its deadline if that can be. Closing the connection cancels them, unless
        they have an idempotency key.

        With `stream`, the answer is a stream of server-sent events.
        """
        exchange: Exchange = request.state.exchange
        exchange.request_id = body.request_id or exchange.request_id
        num_images = body.n or 1
        exchange.facts |= {"size": size_for_log(body.size), "n": num_images}
        engine = slot.require()
        generations = generations_of(body, engine, x_slo_ms)
        client: Caller = request.state.client
        with contextlib.ExitStack() as pending:
            make_images = begin(slot, client, generations, idempotency_key, pending)
            exchange.facts["image_ids"] = ",".join(generation.request_id or "" for generation in generations)
            if body.stream:
                updates = await Updates.open(make_images)
                return ImageStream(request, ImageEvents(body, engine), updates, pending.pop_all())
            try:
                images = await unless_gone(request, make_images(None))
            except ClientGone:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            exchange.facts["image_ids"] = ",".join(image.outcome.request.request_id for image in images)
            exchange.note_outcomes([image.outcome for image in images])
            answer = await asyncio.to_thread(_answer, body, exchange.request_id, engine.intake.card.name, images)
        return Response(answer, media_type="application/json")

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """The one model that this server serves, once for each of its names."""
        model = _model_object(slot.require(), created)
        names = (model.id, *slot.require().intake.card.aliases)
        return ModelList(data=[model.model_copy(update={"id": name}) for name in names])

    @router.get("/v1/models/{model_id:path}", response_model=ModelObject)
    async def get_model(model_id: str) -> ModelObject | Response:
        """What can be asked of the model."""
        model = _model_object(slot.require(), created)
        if not slot.require().intake.card.is_called(model_id):
            return envelope(404, f"model {model_id!r} is not served; served: {model.id!r}", "model_not_found", "model")
        return model

    return router


def _answer(body: ImagesRequest, request_id: str, model: str, images: list[GeneratedImage]) -> str:
    """The response as JSON. Encodes the images: call it off the event loop."""
    output_format, quality = encoding_of(body)
    response = ImagesResponse(
        id=request_id,
        created=int(time.time()),
        model=model,
        size=str(images[0].outcome.request.shape),
        output_format=output_format,
        data=[image_data(image, output_format, quality) for image in images],
        user=body.user,
    )
    return response.model_dump_json(exclude_none=True)


def _model_object(engine: LiveEngine, created: int) -> ModelObject:
    intake, card = engine.intake, engine.intake.card
    sizes = intake.sizes
    return ModelObject(
        id=card.name,
        created=created,
        sizes=[str(size) for size in sizes],
        size_range=SizeRange(
            smallest=str(intake.shapes[0]), largest=str(intake.shapes[-1]), multiple=card.size_multiple
        ),
        degrees={str(size): list(intake.cost.profiled_step_times(size)) for size in sizes},
        default_num_inference_steps=card.default_num_steps,
        max_num_inference_steps=intake.max_steps,
        default_guidance_scale=card.default_guidance_scale,
        max_sequence_length=card.num_text_tokens,
        has_guidance=card.has_guidance,
        has_negative_prompt=card.has_negative_prompt,
        dtype=card.execution.dtype,
        execution=asdict(card.execution),
        reproducibility=Reproducibility(
            same_degrees="identical", max_levels=card.tolerance.max_levels, mean_levels=card.tolerance.mean_levels
        ),
        policy=engine.policy_name,
        num_ranks=len(engine.state.ranks),
    )
