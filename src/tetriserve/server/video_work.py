"""From the body of a request for a video to what the engine is asked for."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Request

from tetriserve.core.errors import InvalidRequest
from tetriserve.core.request import Lora
from tetriserve.engine import Generation, LiveEngine, Video, VideoWish
from tetriserve.engine.pictures import InputPicture
from tetriserve.journal import VideoFacts
from tetriserve.models.card import ModelCard
from tetriserve.server.bodies import Asked, BodyReader
from tetriserve.server.compat import Table, Unserved, ignored_names, warnings_of
from tetriserve.server.exchange import Exchange
from tetriserve.server.generations import degrees_of, seed_of, size_for_log, size_of, slo_of
from tetriserve.server.loras import lora_of
from tetriserve.server.pictures import decode_all, files_of
from tetriserve.server.video_schemas import RemixRequest, VideosRequest
from tetriserve.server.work import Service

_ID_PREFIX = "video_"
_PICTURE = "input_reference"
VIDEO: Table = {
    "user": Unserved("videos are listed by API key"),
    "extra_args": Unserved("what it says is for another scheduler, but for a deadline", ("", {})),
}
"""What may be asked of videos in vain."""


@dataclass(frozen=True)
class VideoWork:
    """One video that is asked for, checked as far as that is possible before its admission."""

    engine: LiveEngine
    card: ModelCard
    generation: Generation
    facts: VideoFacts


def videos_reader() -> BodyReader[VideosRequest]:
    return BodyReader(VideosRequest, _PICTURE, lambda body: (files_of(body.input_reference, _PICTURE), _PICTURE))


async def work_of(service: Service, request: Request, asked: Asked[VideosRequest], slo_ms: float | None) -> VideoWork:
    """`slo_ms`: that of a header. The log line learns of it.

    Raises:
        InvalidRequest, NotReady: it is not served.
    """
    body, exchange, engine = asked.body, _exchange(request), service.slot.require()
    exchange.request_id = body.request_id or exchange.request_id
    exchange.facts["size"] = size_for_log(body)
    warnings = warnings_of(body, VIDEO, service.api.compat)
    if warnings:
        exchange.facts["ignored"] = ignored_names(warnings)
    intake, model = engine.models.chosen(body.model, makes_videos=True, num_images=len(asked.files))
    intake.pictures.check_number(len(asked.files))
    pictures: Sequence[InputPicture] = ()
    if asked.files:
        async with service.decoding:
            pictures = await asyncio.to_thread(decode_all, asked.files, asked.param)
    generation = _generation_of(body, model, intake.card, slo_ms, pictures)
    assert generation.video is not None
    rounding = intake.videos.rounding(generation.video)
    said = warnings if rounding is None else [*warnings, rounding]
    facts = VideoFacts(id=_new_id(generation), model=intake.card.name, warnings=tuple(said))
    return _work(exchange, engine, intake.card, generation, facts)


def remix_of(service: Service, request: Request, body: RemixRequest, source: Video) -> VideoWork:
    """The same video with another prompt.

    Raises:
        UnknownModel: its model is not served any more, or not under that name.
        InvalidRequest: it was made from a picture.
    """
    exchange, engine = _exchange(request), service.slot.require()
    exchange.request_id = body.request_id or exchange.request_id
    before = source.request
    assert before is not None, "it was admitted"
    if before.images:
        raise InvalidRequest(
            f"video {source.facts.id} was made from a picture, which is not kept; create a video with {_PICTURE} again"
        )
    options, lora = before.video, before.lora
    assert options is not None
    card = engine.models.called(source.facts.model, makes_videos=True).card
    generation = Generation(
        prompt=body.prompt,
        size=f"{before.shape.width}x{before.shape.height}",
        seed=before.seed if body.seed is None else seed_of(body.seed),
        num_steps=before.num_schedule_steps,
        guidance_scale=before.guidance_scale,
        negative_prompt=before.negative_prompt,
        true_cfg_scale=before.true_cfg_scale if before.true_cfg_scale > 1 else None,
        max_sequence_length=before.max_sequence_length,
        degrees=before.degrees,
        lora=None if lora is None else Lora(lora.name, lora.scale),
        slo_s=slo_of(body.slo_ms),
        priority=body.priority or 0,
        reject_infeasible=body.deadline_policy == "reject",
        request_id=uuid.uuid4().hex,
        model=source.facts.model,
        video=VideoWish(
            num_frames=before.shape.frames,
            fps=options.fps,
            guidance_scale_2=options.guidance_scale_2,
            boundary_ratio=options.boundary_ratio,
            flow_shift=options.flow_shift,
        ),
    )
    facts = VideoFacts(id=_new_id(generation), model=source.facts.model, remixed_from=source.facts.id)
    return _work(exchange, engine, card, generation, facts)


def _work(
    exchange: Exchange, engine: LiveEngine, card: ModelCard, generation: Generation, facts: VideoFacts
) -> VideoWork:
    exchange.facts["image_ids"] = generation.request_id
    if engine.models.are_several:
        exchange.facts["model"] = card.name
    return VideoWork(engine, card, generation, facts)


def _generation_of(
    body: VideosRequest,
    model: str | None,
    card: ModelCard,
    header_slo_ms: float | None,
    pictures: Sequence[InputPicture],
) -> Generation:
    """`model`: as generations name the model of `card`."""
    return Generation(
        prompt=body.prompt,
        size=size_of(body),
        seed=seed_of(body.seed),
        num_steps=body.num_inference_steps,
        guidance_scale=body.guidance_scale,
        negative_prompt=body.negative_prompt,
        true_cfg_scale=body.true_cfg_scale,
        max_sequence_length=body.max_sequence_length,
        degrees=degrees_of(body),
        lora=lora_of(body.model, body.lora, card),
        slo_s=slo_of(body.slo_ms, header_slo_ms, body.extra_args),
        priority=body.priority or 0,
        reject_infeasible=body.deadline_policy == "reject",
        request_id=uuid.uuid4().hex,
        images=tuple(pictures),
        model=model,
        video=VideoWish(
            num_frames=body.num_frames,
            seconds=body.seconds,
            fps=body.fps,
            guidance_scale_2=body.guidance_scale_2,
            boundary_ratio=body.boundary_ratio,
            flow_shift=body.flow_shift,
        ),
    )


def _new_id(generation: Generation) -> str:
    return f"{_ID_PREFIX}{generation.request_id}"


def _exchange(request: Request) -> Exchange:
    exchange: Exchange = request.state.exchange
    return exchange
