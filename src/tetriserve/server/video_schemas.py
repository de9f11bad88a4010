"""What goes over the wire of `/v1/videos`: OpenAI's videos API, with what TetriServe adds to it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from tetriserve.server.edit_schemas import Pictures
from tetriserve.server.schemas import ClientId, Schedule, Text, Warnings, WorkOptions, inlined

_SECONDS = r"^\d{1,6}(\.\d{1,6})?$"
_NUMBER = re.compile(_SECONDS, re.ASCII)


def _seconds_of(value: object) -> object:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    if isinstance(value, str | bool):
        raise PydanticCustomError("seconds", "must be a number, or one as text such as '4'")
    return value


Seconds = Annotated[
    float,
    BeforeValidator(_seconds_of),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string", "pattern": _SECONDS}]}),
]


class VideosRequest(WorkOptions):
    """Body of `POST /v1/videos` and `/v1/videos/sync`, as JSON, and of `POST /v1/quotes`."""

    prompt: Text = Field(description="What the video shows.", repr=False)
    input_reference: Pictures = Field(
        (),
        description="The picture that the video starts from, where the model takes one: a data URL "
        "(`data:image/png;base64,...`), or an object with one as `image_url`.",
        repr=False,
    )
    seconds: Seconds | None = Field(
        None, description="Length: stands for `num_frames`, of `fps` frames each. A number, or one as text."
    )
    num_frames: int | None = Field(
        None,
        description="Frames; rounded to the nearest number that the model makes, which `warnings` then say. Those of "
        "the model's own size by default.",
    )
    fps: float | None = Field(
        None, description="Frames per second of the file, 1 to 120; the model's own number by default."
    )
    guidance_scale_2: float | None = Field(
        None, description="`guidance_scale` of steps that a second transformer makes; the same by default."
    )
    boundary_ratio: float | None = Field(
        None, description="Noise level below which steps are the second transformer's, 0 to 1; the model's by default."
    )
    flow_shift: float | None = Field(
        None, description="Shift of the schedule's noise levels, 0.01 to 100; the model's own by default."
    )
    n: Literal[1] | None = Field(None, description="A call makes one video.")
    user: Text | None = Field(None, description="Ignored: videos are listed by API key.")


class RemixRequest(BaseModel):
    """Body of `POST /v1/videos/{id}/remix`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Text = Field(description="What the new video shows.", repr=False)
    seed: int | None = Field(None, description="That of the first video by default; -1: random.")
    slo_ms: float | None = Field(None, description="As for `/v1/videos`; not taken over from the first video.")
    priority: int | None = Field(None, description="As for `/v1/videos`; not taken over from the first video.")
    deadline_policy: Literal["best_effort", "reject"] | None = None
    request_id: ClientId | None = None


UNSERVED = {"stream": "a video is a job: ask /v1/videos/{id} for its progress, or call /v1/videos/sync"}
"""What other servers' clients may ask of videos that would change the answer: why it is refused."""


class VideoError(BaseModel):
    """Why there is no video, with the codes of `/v1/images/generations`."""

    code: str
    message: str


class VideoObject(BaseModel):
    """A video, from its acceptance until it expires. The last five fields are ours, and not OpenAI's."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"] = Field(
        description="`queued` until a first task of it has started."
    )
    progress: int = Field(description="Percent of its steps; 100 when it is completed.", ge=0, le=100)
    created_at: int = Field(description="Unix time in seconds.")
    completed_at: int | None
    expires_at: int | None = Field(description="When it will be gone; null while it is not finished.")
    prompt: str
    size: str
    seconds: str = Field(description="`num_frames` over `fps`.")
    num_frames: int
    fps: float
    seed: int
    remixed_from_video_id: str | None
    error: VideoError | None
    slo_ms: float
    predicted_finish_ms: float | None = Field(
        description="Milliseconds from now, by a forecast at most a second old; null when it is finished, or unknown."
    )
    schedule: Schedule | None = Field(None, description="What happened to it; absent until it is completed.")
    warnings: Warnings = None


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


def videos_body() -> dict[str, Any]:
    """`requestBody` for `/openapi.json`."""
    described = inlined(VideosRequest)
    fields = {name: schema for name, schema in described["properties"].items() if name != "input_reference"}
    picture = {"type": "string", "format": "binary", "description": "A png, jpeg or webp file."}
    return {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"input_reference": picture, **fields},
                    "required": ["prompt"],
                    "additionalProperties": False,
                }
            },
            "application/json": {"schema": described},
        },
    }
