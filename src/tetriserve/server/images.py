"""From a generated image to what goes over the wire."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from PIL import Image

from tetriserve.engine import GeneratedImage
from tetriserve.models.card import ModelCard
from tetriserve.models.registry import family_of
from tetriserve.server.schemas import PictureOptions, Schedule, TaskRun, Usage, UsageDetails
from tetriserve.workload.outcome import Outcome

if TYPE_CHECKING:
    import numpy as np

OutputFormat = Literal["png", "jpeg", "webp"]

_PNG_LEVEL = 1
"""zlib's fastest: its default takes about three times as long for a file a fifth smaller, and a client waits."""
_PREVIEW_QUALITY = 75


class Encoding(NamedTuple):
    """A file format, and the quality of one that loses something: 0 to 100."""

    format: OutputFormat
    quality: int = 100

    @property
    def media_type(self) -> str:
        return f"image/{self.format}"


def encoding_of(body: PictureOptions) -> Encoding:
    """What the client wants."""
    return Encoding(body.output_format or "png", 100 if body.output_compression is None else body.output_compression)


def preview_encoding(wanted: Encoding) -> Encoding:
    """A preview's, for an image of `wanted`: png of what is enlarged takes ten times the bytes."""
    return Encoding("webp" if wanted.format == "webp" else "jpeg", _PREVIEW_QUALITY)


def encode_all(images: Sequence[GeneratedImage], encoding: Encoding) -> list[bytes]:
    """Files. Takes tens of milliseconds for a large image: call it off the event loop."""
    return [encode(image.pixels, encoding) for image in images]


def base64_of(file: bytes) -> str:
    return base64.b64encode(file).decode("ascii")


def usage_of(card: ModelCard, images: Sequence[GeneratedImage]) -> Usage:
    """Tokens that the model worked on for `images`."""
    requests = [image.outcome.request for image in images]
    num_text = sum(request.max_sequence_length or card.num_text_tokens for request in requests)
    family = family_of(card)
    seen = [shape for request in requests for shape in family.condition_shapes(card, request.images)]
    num_seen = sum(family.num_tokens(card, shape) for shape in seen)
    num_image = sum(family.num_tokens(card, request.shape) for request in requests)
    return Usage(
        input_tokens=num_text + num_seen,
        input_tokens_details=UsageDetails(text_tokens=num_text, image_tokens=num_seen),
        output_tokens=num_image,
        total_tokens=num_text + num_seen + num_image,
    )


def encode(pixels: np.ndarray, encoding: Encoding) -> bytes:
    """The file's bytes. `pixels` are uint8, (height, width, 3)."""
    file = io.BytesIO()
    picture = Image.fromarray(pixels)
    if encoding.format == "png":
        picture.save(file, "png", compress_level=_PNG_LEVEL)
    else:
        picture.save(file, encoding.format, quality=max(encoding.quality, 1))  # to libjpeg's wrapper 0 means "no wish"
    return file.getvalue()


def schedule(outcome: Outcome) -> Schedule:
    """What happened to the image, in seconds after its arrival."""
    request, text = outcome.request, outcome.text
    arrival_s = request.arrival_s
    return Schedule(
        attained=outcome.is_attained,
        slo_ms=round((request.deadline_s - arrival_s) * 1000, 3),
        latency_s=_rounded(outcome.latency_s),
        queued_s=_rounded(outcome.queued_s),
        predicted_finish_s=_rounded(outcome.predicted_finish_s - arrival_s),
        finish_s=_rounded(outcome.finish_s - arrival_s),
        gpu_time_s=_rounded(outcome.gpu_time_s),
        degrees=list(outcome.degrees),
        prompt_tokens=None if text is None else text.num_tokens,
        truncated=None if text is None else text.is_truncated,
        runs=[
            TaskRun(
                stage=run.task.stage,
                ranks=list(run.task.ranks),
                degree=run.task.degree,
                num_steps=run.task.num_steps,
                batch=run.task.batch,
                start_s=_rounded(run.start_s - arrival_s),
                end_s=_rounded(run.end_s - arrival_s),
            )
            for run in outcome.runs
        ],
    )


def _rounded(seconds: float) -> float:
    """To the microsecond: finer than any clock here is true."""
    return round(seconds, 6)
