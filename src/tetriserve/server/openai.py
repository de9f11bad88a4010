"""OpenAI's routes: images and models."""

from __future__ import annotations

import time
from dataclasses import asdict

from fastapi import APIRouter, Request, Response

from tetriserve.core.memory import HeldAlike
from tetriserve.engine import Intake, LiveEngine
from tetriserve.server.answers import STREAM_RESPONSES, answer
from tetriserve.server.errors import KEY_RESPONSES, RESPONSES
from tetriserve.server.idempotency import KeyHeader
from tetriserve.server.schemas import (
    HeldMemory,
    ImagesRequest,
    ImagesResponse,
    ModelList,
    ModelObject,
    Reproducibility,
    SizeRange,
)
from tetriserve.server.streaming import GENERATION
from tetriserve.server.work import IdHeader, Service, SloHeader


def openai_router(service: Service) -> APIRouter:
    router = APIRouter(responses=RESPONSES)
    slot, created = service.slot, int(time.time())

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
        work = service.work_of(request, body, x_slo_ms)
        return await answer(work, idempotency_key, GENERATION)

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """The models that this server serves, each once for each of its names, and its LoRAs, whose `parent` it is."""
        engine, listed = slot.require(), []
        for intake in engine.models.intakes:
            model, card = _model_object(engine, intake, created), intake.card
            names = [{"id": name} for name in (model.id, *card.aliases)]
            loras = [{"id": lora.name, "parent": card.name} for lora in card.loras]
            listed += [model.model_copy(update=update) for update in (*names, *loras)]
        return ModelList(data=listed)

    @router.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> ModelObject:
        """What can be asked of a model."""
        engine = slot.require()
        intake = engine.models.named(model_id)
        model, card = _model_object(engine, intake, created), intake.card
        if lora := card.find_lora(model_id):
            return model.model_copy(update={"id": lora.name, "parent": card.name})
        return model

    return router


def _model_object(engine: LiveEngine, intake: Intake, created: int) -> ModelObject:
    card, sizes = intake.card, intake.sizes
    return ModelObject(
        id=card.name,
        parent=None,
        created=created,
        sizes=[str(size) for size in sizes],
        size_range=SizeRange(smallest=str(intake.shapes[0]), largest=str(intake.largest), multiple=card.size_multiple),
        degrees={str(size): list(intake.cost.profiled_step_times(size)) for size in sizes},
        default_num_inference_steps=card.default_num_steps,
        max_num_inference_steps=intake.max_steps,
        default_guidance_scale=card.default_guidance_scale,
        max_sequence_length=card.num_text_tokens,
        limits=list(card.limits),
        has_guidance=card.has_guidance,
        has_negative_prompt=card.has_negative_prompt,
        min_images=card.min_images,
        max_images=intake.pictures.max_images,
        default_strength=card.default_strength if intake.pictures.max_images else None,
        dtype=card.execution.dtype,
        execution=asdict(card.execution),
        reproducibility=Reproducibility(
            same_degrees="identical", max_levels=card.tolerance.max_levels, mean_levels=card.tolerance.mean_levels
        ),
        policy=engine.policy_name,
        num_ranks=len(engine.state.stage_ranks.among(card.key, "", engine.state.ranks)),
        memory=[_held(held, engine, intake) for held in engine.memory_of(card.key)],
    )


def _held(held: HeldAlike, engine: LiveEngine, intake: Intake) -> HeldMemory:
    stage_ranks, key = engine.state.stage_ranks, intake.card.key
    return HeldMemory(
        ranks=list(held.ranks),
        stages=[kind for kind in intake.cost.profile.stages if stage_ranks.allows(key, kind, held.ranks)],
        components={component.name: component.num_bytes for component in held.components},
        total=held.num_bytes,
        resident=list(held.resident_bytes),
    )
