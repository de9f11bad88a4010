"""From a generated image to what goes over the wire."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Literal

from PIL import Image

from tetriserve.engine import GeneratedImage
from tetriserve.server.schemas import ImageData, ImagesRequest, Schedule, TaskRun
from tetriserve.workload.outcome import Outcome

if TYPE_CHECKING:
    import numpy as np

OutputFormat = Literal["png", "jpeg", "webp"]

_PNG_LEVEL = 1
"""zlib's fastest: its default takes about three times as long for a file a fifth smaller, and a client waits."""


def encoding_of(body: ImagesRequest) -> tuple[OutputFormat, int]:
    """The file format that the client wants, and its quality."""
    return body.output_format or "png", 100 if body.output_compression is None else body.output_compression


def image_data(image: GeneratedImage, output_format: OutputFormat, quality: int) -> ImageData:
    """One item of the answer. Takes tens of milliseconds for a large image: call it off the event loop."""
    return ImageData(
        b64_json=base64.b64encode(encode(image.pixels, output_format, quality)).decode("ascii"),
        seed=image.outcome.request.seed,
        schedule=schedule(image.outcome),
    )


def encode(pixels: np.ndarray, output_format: OutputFormat, quality: int) -> bytes:
    """The file's bytes. `pixels` are uint8, (height, width, 3); `quality` is 0 to 100, for jpeg and webp."""
    file = io.BytesIO()
    picture = Image.fromarray(pixels)
    if output_format == "png":
        picture.save(file, "png", compress_level=_PNG_LEVEL)
    else:
        picture.save(file, output_format, quality=max(quality, 1))  # to libjpeg's wrapper 0 means "no wish"
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
