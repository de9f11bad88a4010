"""What goes over the wire: OpenAI's images and models, with what TetriServe adds to them.

Types are strict: a field of the wrong JSON type is refused, never converted. Ranges that the Python API shares are
checked by `engine.intake`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError


def _check_text(text: str) -> str:
    r"""JSON can escape half of a surrogate pair (`"\ud800"`), which is no character and cannot be written out again."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("text", "character {at} is half of a surrogate pair", {"at": error.start}) from None
    return text


Text = Annotated[str, AfterValidator(_check_text)]
ClientId = Annotated[str, StringConstraints(pattern=r"^[ -~]{1,128}$")]
"""A client's own name for a request: 1 to 128 printable ASCII characters."""
Side = Annotated[int, Field(ge=1, le=100_000)]
"""Pixels."""
Warnings = Annotated[
    list[str] | None,
    Field(description="Parameters that were ignored, and why: one sentence each. Absent if there are none."),
]


class LoraChoice(BaseModel):
    """An adapter, and how strongly it acts."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    scale: float = Field(1.0, description="1 is as it was trained; -10 to 10.")


class WorkOptions(BaseModel):
    """What may be asked of an image or a video beside what to draw. A field that is null is a field that is absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(
        None,
        description="A name that `/v1/models` lists, `default`, or the directory that the server was started with.",
    )
    size: str | None = Field(None, description='"WIDTHxHEIGHT" in pixels, or "auto": the model\'s first size.')
    width: Side | None = Field(None, description="With `height`, instead of `size`.")
    height: Side | None = Field(None, description="With `width`, instead of `size`.")
    seed: int | None = Field(
        None, description="Seed of the first image; the others take the numbers after it. -1, as none: random."
    )
    num_inference_steps: int | None = Field(None, description="Denoise steps; the model's own number by default.")
    guidance_scale: float | None = Field(None, description="Distilled guidance; the model's own by default.")
    negative_prompt: Text | None = Field(
        None, description="What not to draw; each step then takes two passes.", repr=False
    )
    true_cfg_scale: float | None = Field(None, description="Classifier-free guidance towards `prompt`.")
    max_sequence_length: int | None = Field(
        None, description="Text tokens, to which the prompt is padded and at which it is cut; the model's by default."
    )
    degrees: Annotated[list[int], Field(min_length=1, max_length=16)] | int | None = Field(
        None,
        description="Degrees of sequence parallelism that its steps may run at: one, or a list. By default the "
        "scheduler chooses among those of the size. One degree makes the image reproducible bit by bit.",
    )
    lora: LoraChoice | str | None = Field(
        None, description="An adapter that `/v1/models` lists, by name or with a scale; none by default."
    )
    slo_ms: float | None = Field(
        None,
        description="Deadline in milliseconds after arrival; wins over the header X-SLO-Ms. By default a multiple of "
        "what the request takes alone on one rank.",
    )
    priority: int | None = Field(None, description="Class of the request: lower is served earlier, 0 by default.")
    deadline_policy: Literal["best_effort", "reject"] | None = Field(
        None,
        description="`reject` refuses with 429 a request whose deadline cannot be promised (see /v1/quotes); "
        "best_effort by default.",
    )
    request_id: ClientId | None = Field(
        None, description="The client's own id, echoed in `id` and X-Request-Id; wins over the header X-Request-Id."
    )
    extra_args: dict[str, Any] | str | None = Field(
        None,
        description="Of GF-DiT's load generator: an object, or one as text. Its deadline is that of the request if "
        "there is no other; the rest is ignored.",
        repr=False,
    )


class PictureOptions(WorkOptions):
    """What may be asked of pictures beside what to draw."""

    n: Annotated[int, Field(ge=1, le=10)] | None = Field(None, description="How many images; 1 by default.")
    strength: float | None = Field(
        None,
        description="Where the image starts from a picture: how much of the noise is added to it, above 0 (hardly any "
        "change) and at most 1 (hardly anything is left of it); the model's own by default.",
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None,
        description="`url`: the server keeps the image for a while, and the answer says where; b64_json by default.",
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="png by default.")
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of a jpeg or webp image, 0 to 100 (the default)."
    )
    user: Text | None = Field(None, description="Echoed.")
    safety_identifier: Text | None = Field(None, description="Echoed.")
    quality: Literal["auto", "standard", "low", "medium", "high", "xhigh", "max", "hd"] | None = Field(
        None, description="One quality is served; others than auto and standard are ignored."
    )
    style: Literal["auto", "vivid", "natural"] | None = Field(None, description="Ignored, but for auto.")
    complexity: Literal["low", "medium", "high"] | None = Field(None, description="Ignored.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Backgrounds are opaque.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Images are not moderated; low is ignored.")
    stream: bool | None = Field(None, description="Answer with server-sent events: progress, previews, images.")
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = Field(
        None, description="At most so many previews of each image, with `stream`; 0 by default."
    )
    num_frames: Literal[1] | None = Field(None, description="Of other servers: an image is one frame.")
    fps: float | None = Field(None, description="Of other servers: frames per second of a video. Ignored.")
    guidance_scale_2: float | None = Field(None, description="Of other servers: for a second transformer. Ignored.")


class ImagesRequest(PictureOptions):
    """Body of `POST /v1/images/generations`."""

    prompt: Text = Field(description="What to draw.", repr=False)


UNSERVED = {
    "frame_count": "an image is one frame",
    "frame_duration_ms": "an image is one frame",
    "svg": "images are png, jpeg or webp",
}
"""Documented parameters of OpenAI's `images.generate` that would change what is drawn: why they are refused."""


class TaskRun(BaseModel):
    """One task of the request: a stage, or a run of denoise steps, on a set of ranks."""

    stage: str
    ranks: list[int]
    degree: int
    num_steps: int = Field(description="Denoise steps in this run; 0 in other stages.")
    batch: int = Field(description="Images that were worked for together, this one included.")
    start_s: float
    end_s: float


class Schedule(BaseModel):
    """What happened to one image. Times are seconds after its arrival, image encoding not included."""

    attained: bool
    slo_ms: float
    latency_s: float
    queued_s: float = Field(description="Time in which no rank worked for it.")
    predicted_finish_s: float = Field(description="As predicted at admission.")
    finish_s: float
    gpu_time_s: float = Field(description="Rank-seconds spent.")
    degrees: list[int] = Field(description="Degree of every denoise step.")
    prompt_tokens: int | None = Field(None, description="Tokens of the prompt, the marks of its ends included.")
    truncated: bool | None = Field(
        None, description="The prompt is longer than a text encoder reads, and its end had no effect."
    )
    runs: list[TaskRun]


class ImageData(BaseModel):
    b64_json: str | None = Field(None, description="The file; absent with `response_format: url`.")
    url: str | None = Field(None, description="Where the file can be fetched for a while, with `response_format: url`.")
    seed: int
    schedule: Schedule


class UsageDetails(BaseModel):
    text_tokens: int
    image_tokens: int = Field(0, description="Of pictures that take part in steps beside the image.")


class Usage(BaseModel):
    """Tokens that the model works on: the text's, padding included, and the image's."""

    input_tokens: int
    input_tokens_details: UsageDetails
    output_tokens: int
    total_tokens: int


class ImagesResponse(BaseModel):
    id: str
    created: int = Field(description="Unix time in seconds.")
    model: str
    size: str
    output_format: Literal["png", "jpeg", "webp"]
    background: Literal["opaque"] = "opaque"
    data: list[ImageData]
    usage: Usage = Field(description="Of all images together.")
    user: str | None = None
    safety_identifier: str | None = None
    warnings: Warnings = None


class ProgressEvent(BaseModel):
    """A task of an image started or ended, or the image was admitted."""

    type: Literal["image_generation.progress", "image_edit.progress"]
    image_index: int = Field(description="Which of the `n` images, from 0.")
    stage: str
    step: int = Field(description="Denoise steps that are over.")
    num_steps: int
    degree: int = Field(description="Ranks that work for the image from now on; 0 for none.")
    predicted_finish_ms: float | None = Field(description="Milliseconds from now, by a forecast at most a second old.")


class _PictureEvent(BaseModel):
    """What OpenAI's two kinds of pictures have in common, and which of the `n` images it is."""

    b64_json: str
    created_at: int = Field(description="Unix time in seconds.")
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"]
    image_index: int = Field(description="Which of the `n` images, from 0.")


class PartialImageEvent(_PictureEvent):
    """A preview: small, and a jpeg or webp file whatever the image will be; `size` and `output_format` are its own."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    partial_image_index: int


class CompletedEvent(_PictureEvent):
    """A finished image."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    usage: Usage
    seed: int
    schedule: Schedule
    warnings: Warnings = None


class QuotedImage(BaseModel):
    """What is forecast for one image."""

    predicted_finish_ms: float | None = Field(description="From now; null: it would never end, as no rank is up.")
    degrees: list[int] = Field(description="Degree of every denoise step.")


class QuoteResponse(BaseModel):
    """What could be promised now. Milliseconds are from now."""

    feasible: bool = Field(
        description="All images are forecast to end by the deadline with a little to spare, and nobody in the queue to "
        "become late by it."
    )
    slo_ms: float = Field(description="The deadline asked for.")
    predicted_finish_ms: float | None = Field(description="When the last image would end; null: never.")
    earliest_deadline_ms: float | None = Field(
        description="The least slo_ms of those tried that is feasible; null if none of them is."
    )
    queue_position: int = Field(description="Images now waiting that would go first.")
    data: list[QuotedImage]
    model: str | None = Field(None, description="Which would make them; absent where one model is served.")
    warnings: Warnings = None


class SizeRange(BaseModel):
    """Which other sizes are served: both sides multiples of `multiple`, pixels between those of the two sizes."""

    smallest: str
    largest: str
    multiple: int


class Reproducibility(BaseModel):
    """What a seed promises at the served dtype. The numbers are levels of 255, as tested with the bundled model."""

    same_degrees: Literal["identical"] = Field(
        description="Two images whose steps ran at the same degrees and were shared with no other image (as those of "
        "requests that name one degree), on the same machine and libraries. At degree 1 they are also those of the "
        "diffusers pipeline, run as `execution` says.",
    )
    max_levels: int = Field(description="Largest difference of a subpixel between images at degree 1 and at others.")
    mean_levels: float = Field(description="Mean difference of all subpixels.")


class HeldMemory(BaseModel):
    """What ranks hold of the model: parameters and buffers, on each of them."""

    ranks: list[int]
    stages: list[str] = Field(description="Which stages of a request they run.")
    components: dict[str, int] = Field(description="Bytes by component of the checkpoint.")
    total: int = Field(description="Bytes of all components.")
    resident: list[int] = Field(
        description="Bytes of each rank's process on the host when it was ready, in the order of `ranks`; 0: unknown."
    )


class ModelObject(BaseModel):
    """OpenAI's model object, and what a client of this server may want to know."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["tetriserve"] = "tetriserve"
    parent: str | None = Field(None, description="Of a LoRA: the model that it is for.")
    sizes: list[str] = Field(description="The model's own sizes, the default first.")
    size_range: SizeRange
    degrees: dict[str, list[int]] = Field(description="Degrees of sequence parallelism that each size can run at.")
    default_num_inference_steps: int
    max_num_inference_steps: int
    default_guidance_scale: float
    max_sequence_length: int = Field(
        description="Text tokens of a request that asks for no fewer; 0: it cannot be asked for."
    )
    limits: list[str] = Field(description="What this server cannot do with this model, and can with others.")
    has_guidance: bool
    has_negative_prompt: bool
    min_images: int = Field(description="Pictures that must come with a prompt, to /v1/images/edits.")
    max_images: int = Field(description="Pictures that may come with a prompt; 0 for none.")
    default_strength: float | None = Field(
        description="Of an image that starts from a picture; null where no image does."
    )
    dtype: str
    execution: dict[str, str] = Field(
        description="How the model is run: dtype, attention, compile, quantization, tiling, offload. `default` is as "
        "diffusers does it."
    )
    reproducibility: Reproducibility
    policy: str
    num_ranks: int = Field(description="Ranks that are up, of those that hold the model.")
    memory: list[HeldMemory] = Field(description="By role: ranks that hold the same are one entry.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


class Probe(BaseModel):
    status: Literal["alive", "ready"]


class ErrorBody(BaseModel):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="The field at fault, as the client spelt it.")
    code: str
    earliest_deadline_ms: float | None = Field(
        None,
        description="With code deadline_infeasible: the least slo_ms found that could be promised now; absent if none "
        "was found.",
    )


class ErrorEnvelope(BaseModel):
    """OpenAI's error envelope: every answer that is not a success has this form."""

    error: ErrorBody


def inlined(schema: type[BaseModel]) -> dict[str, Any]:
    """For a body in `/openapi.json` that its route reads itself: FastAPI describes only what it reads."""
    described = schema.model_json_schema(ref_template="#/components/schemas/{model}")
    described.pop("$defs", None)
    return described
