"""From the body of a request for images to what the engine is asked for."""

from __future__ import annotations

import uuid

from tetriserve.core.errors import InvalidRequest, UnknownModel
from tetriserve.core.request import Shape
from tetriserve.engine import Generation, LiveEngine
from tetriserve.engine.intake import MAX_SLO_S
from tetriserve.server.schemas import ImagesRequest


def size_for_log(size: str | None) -> str:
    """The size as a log line says it: what a client wrote there may be any text."""
    if size is None or size == "auto":
        return "auto"
    try:
        return str(Shape.parse(size))
    except ValueError:
        return "invalid"


def generations_of(body: ImagesRequest, engine: LiveEngine, header_slo_ms: float | None) -> list[Generation]:
    """One per image, with consecutive seeds.

    Raises:
        UnknownModel: the engine serves another one.
        InvalidRequest: fields contradict each other.
    """
    card = engine.intake.card
    if body.model is not None and not card.is_called(body.model):
        raise UnknownModel(f"model {body.model[:200]!r} is not served; served: {card.name!r}", "model")
    if body.output_format in (None, "png") and body.output_compression not in (None, 100):
        raise InvalidRequest(
            "output_compression is the quality of a jpeg or webp image, and output_format is png", "output_compression"
        )
    if body.partial_images and not body.stream:
        raise InvalidRequest("partial_images needs stream: true", "partial_images")
    degrees: tuple[int, ...] | None = None
    if body.degrees is not None:
        degrees = (body.degrees,) if isinstance(body.degrees, int) else tuple(body.degrees)
    slo_ms = header_slo_ms if body.slo_ms is None else body.slo_ms
    if slo_ms is not None and not 0 < slo_ms <= MAX_SLO_S * 1000:
        raise InvalidRequest(f"slo_ms is {slo_ms:g}; allowed: above 0, at most {MAX_SLO_S * 1000:g}", "slo_ms")
    return [
        Generation(
            prompt=body.prompt,
            size=body.size,
            seed=None if body.seed is None else body.seed + number,
            num_steps=body.num_inference_steps,
            guidance_scale=body.guidance_scale,
            negative_prompt=body.negative_prompt,
            true_cfg_scale=body.true_cfg_scale,
            max_sequence_length=body.max_sequence_length,
            degrees=degrees,
            slo_s=None if slo_ms is None else slo_ms / 1000,
            priority=body.priority or 0,
            reject_infeasible=body.deadline_policy == "reject",
            request_id=uuid.uuid4().hex,
        )
        for number in range(body.n or 1)
    ]
