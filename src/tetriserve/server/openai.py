"""OpenAI's routes: images and models."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from tetriserve.core.errors import InvalidRequest, UnknownModel
from tetriserve.engine import GeneratedImage, Generation, LiveEngine
from tetriserve.server.access import Client
from tetriserve.server.disconnect import ClientGone, unless_gone
from tetriserve.server.errors import RESPONSES, envelope
from tetriserve.server.exchange import CLIENT_CLOSED_REQUEST, Exchange
from tetriserve.server.images import image_data
from tetriserve.server.schemas import (
    ClientId,
    ImagesRequest,
    ImagesResponse,
    ModelList,
    ModelObject,
    SizeRange,
)
from tetriserve.server.slot import EngineSlot

SloHeader = Annotated[float | None, Header(alias="X-SLO-Ms", description="As `slo_ms` in the body, which wins.")]
IdHeader = Annotated[
    ClientId | None, Header(alias="X-Request-Id", description="As `request_id` in the body, which wins.")
]


def openai_router(slot: EngineSlot) -> APIRouter:
    router = APIRouter(responses=RESPONSES)
    created = int(time.time())

    @router.post("/v1/images/generations", response_model=ImagesResponse)
    async def generate_images(
        request: Request, body: ImagesRequest, x_slo_ms: SloHeader = None, x_request_id: IdHeader = None
    ) -> Response:
        """Make `n` images of a prompt, each by its deadline if that can be. Closing the connection cancels them."""
        exchange: Exchange = request.state.exchange
        exchange.request_id = body.request_id or exchange.request_id
        num_images = body.n or 1
        exchange.facts |= {"size": body.size or "auto", "n": num_images}
        engine = slot.require()
        _check_model(engine, body.model)
        generations = _generations(body, num_images, x_slo_ms)
        client: Client = request.state.client
        with client.allowance.admitted(num_images, time.monotonic()):
            exchange.facts["image_ids"] = ",".join(generation.request_id or "" for generation in generations)
            try:
                images = await unless_gone(request, engine.generate_all(generations))
            except ClientGone:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            outcomes = [image.outcome for image in images]
            exchange.facts["latency_s"] = round(max(outcome.latency_s for outcome in outcomes), 3)
            exchange.facts["attained"] = f"{sum(outcome.is_attained for outcome in outcomes)}/{num_images}"
            answer = await asyncio.to_thread(_answer, body, exchange.request_id, engine.intake.card.name, images)
        return Response(answer, media_type="application/json")

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """The one model that this server serves."""
        return ModelList(data=[_model_object(slot.require(), created)])

    @router.get("/v1/models/{model_id:path}", response_model=ModelObject)
    async def get_model(model_id: str) -> ModelObject | Response:
        """What can be asked of the model."""
        model = _model_object(slot.require(), created)
        if model_id != model.id:
            return envelope(404, f"model {model_id!r} is not served; served: {model.id!r}", "model_not_found", "model")
        return model

    return router


def _check_model(engine: LiveEngine, model: str | None) -> None:
    served = engine.intake.card.name
    if model is not None and model != served:
        raise UnknownModel(f"model {model[:200]!r} is not served; served: {served!r}", "model")


def _generations(body: ImagesRequest, num_images: int, header_slo_ms: float | None) -> list[Generation]:
    """One per image, with consecutive seeds.

    Raises:
        InvalidRequest: fields contradict each other.
    """
    if body.output_format in (None, "png") and body.output_compression not in (None, 100):
        raise InvalidRequest(
            "output_compression is the quality of a jpeg or webp image, and output_format is png", "output_compression"
        )
    slo_ms = header_slo_ms if body.slo_ms is None else body.slo_ms
    return [
        Generation(
            prompt=body.prompt,
            size=body.size,
            seed=None if body.seed is None else body.seed + number,
            num_steps=body.num_inference_steps,
            guidance_scale=body.guidance_scale,
            negative_prompt=body.negative_prompt,
            true_cfg_scale=body.true_cfg_scale,
            slo_s=None if slo_ms is None else slo_ms / 1000,
            priority=body.priority or 0,
            reject_infeasible=body.deadline_policy == "reject",
            request_id=uuid.uuid4().hex,
        )
        for number in range(num_images)
    ]


def _answer(body: ImagesRequest, request_id: str, model: str, images: list[GeneratedImage]) -> str:
    """The response as JSON. Encodes the images: call it off the event loop."""
    output_format = body.output_format or "png"
    quality = 100 if body.output_compression is None else body.output_compression
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
        has_guidance=card.has_guidance,
        has_negative_prompt=card.has_negative_prompt,
        dtype=card.dtype,
        policy=engine.policy_name,
        num_ranks=len(engine.state.ranks),
    )
