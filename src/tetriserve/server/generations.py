"""From the body of a request for images to what the engine is asked for."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from tetriserve.core.errors import InvalidRequest
from tetriserve.core.request import Shape
from tetriserve.engine import Generation
from tetriserve.engine.intake import MAX_SEED, MAX_SLO_S
from tetriserve.engine.pictures import InputPicture
from tetriserve.models.card import ModelCard
from tetriserve.server.compat import deadline_of
from tetriserve.server.loras import lora_of
from tetriserve.server.schemas import ImagesRequest, WorkOptions

RANDOM_SEED = -1
"""What many servers take for "choose one"."""


def size_for_log(body: WorkOptions) -> str:
    """The size as a log line says it: what a client wrote there may be any text."""
    try:
        size = size_of(body)
        return "auto" if size is None or size == "auto" else str(Shape.parse(size))
    except (InvalidRequest, ValueError):
        return "invalid"


def size_of(body: WorkOptions) -> str | None:
    """The size that is asked for, in whichever way.

    Raises:
        InvalidRequest: half of one, or two.
    """
    width, height = body.width, body.height
    if width is None and height is None:
        return body.size
    if width is None or height is None:
        missing, given = ("width", "height") if width is None else ("height", "width")
        raise InvalidRequest(f"{missing} is required beside {given}", missing)
    size = f"{width}x{height}"
    if body.size not in (None, "auto", size):
        raise InvalidRequest(f"size is {body.size[:80]!r}, and width and height are {size}; leave one out", "size")
    return size


def degrees_of(body: WorkOptions) -> tuple[int, ...] | None:
    if body.degrees is None:
        return None
    return (body.degrees,) if isinstance(body.degrees, int) else tuple(body.degrees)


def slo_of(
    slo_ms: float | None, header_slo_ms: float | None = None, extra_args: dict[str, Any] | str | None = None
) -> float | None:
    """Seconds from arrival to the deadline, of the first that says one; None: it is left to the server.

    Raises:
        InvalidRequest: it is out of range, or `extra_args` is not what may be in it.
    """
    said = slo_ms, header_slo_ms, deadline_of(extra_args)
    slo_ms = next((each for each in said if each is not None), None)
    if slo_ms is not None and not 0 < slo_ms <= MAX_SLO_S * 1000:
        raise InvalidRequest(f"slo_ms is {slo_ms:g}; allowed: above 0, at most {MAX_SLO_S * 1000:g}", "slo_ms")
    return None if slo_ms is None else slo_ms / 1000


def seed_of(seed: int | None) -> int | None:
    """None: any.

    Raises:
        InvalidRequest: it is out of range.
    """
    if seed is None or seed == RANDOM_SEED:
        return None
    if not 0 <= seed <= MAX_SEED:
        raise InvalidRequest(f"seed is {seed}; allowed: 0 to {MAX_SEED}, or {RANDOM_SEED} for any", "seed")
    return seed


def generations_of(
    body: ImagesRequest,
    model: str | None,
    card: ModelCard,
    header_slo_ms: float | None,
    pictures: Sequence[InputPicture] = (),
) -> list[Generation]:
    """One per image, with consecutive seeds.

    Args:
        model: as generations name the model of `card`; None where it is the one that they get without a name.
        pictures: come with the prompt.

    Raises:
        InvalidRequest: fields contradict each other.
    """
    if body.stream and body.response_format == "url":
        raise InvalidRequest("response_format is 'url'; with stream: true served: 'b64_json'", "response_format")
    if body.partial_images and not body.stream:
        raise InvalidRequest("partial_images needs stream: true", "partial_images")
    lora = lora_of(body.model, body.lora, card)
    degrees, slo_s, seed = degrees_of(body), slo_of(body.slo_ms, header_slo_ms, body.extra_args), seed_of(body.seed)
    size = size_of(body)
    return [
        Generation(
            prompt=body.prompt,
            size=size,
            seed=None if seed is None else seed + number,
            num_steps=body.num_inference_steps,
            guidance_scale=body.guidance_scale,
            negative_prompt=body.negative_prompt,
            true_cfg_scale=body.true_cfg_scale,
            max_sequence_length=body.max_sequence_length,
            degrees=degrees,
            lora=lora,
            slo_s=slo_s,
            priority=body.priority or 0,
            reject_infeasible=body.deadline_policy == "reject",
            request_id=uuid.uuid4().hex,
            images=tuple(pictures),
            strength=body.strength,
            model=model,
        )
        for number in range(body.n or 1)
    ]
