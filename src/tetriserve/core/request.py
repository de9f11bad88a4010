"""What a client asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

MAX_SIDE = 999_999
"""Pixels of a height or width."""
RAW_PIXELS = "application/x-raw-rgb8"
"""Media type of an image that nobody has encoded: a bundle with `pixels`, uint8, (height, width, 3)."""
MP4 = "video/mp4"
"""Media type of a video: a bundle with the bytes of two files, uint8: `video` (MP4, H.264) and `thumbnail` (JPEG)."""
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """Output size in pixels; `frames` is 1 for an image."""

    height: int
    width: int
    frames: int = 1

    @classmethod
    def parse(cls, size: str) -> Shape:
        """Read OpenAI's `"WxH"` (width first).

        Raises:
            ValueError: `size` is not two positive integers joined by `x`.
        """
        match = _SIZE.fullmatch(size)
        if match is None or min(int(match[1]), int(match[2])) == 0:
            raise ValueError(f"size {size[:40]!r} is not of the form WIDTHxHEIGHT, such as 512x512")
        return cls(height=int(match[2]), width=int(match[1]))

    @property
    def num_pixels(self) -> int:
        return self.height * self.width * self.frames

    def __str__(self) -> str:
        size = f"{self.width}x{self.height}"
        return size if self.frames == 1 else f"{size}x{self.frames}"


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA adapter as a request wants it.

    name: what the server was told to call it.
    scale: by which its part of each layer's output is multiplied; 1.0 is as it was trained.
    digest: of its file, so that a request that is resumed in a later life of the server gets the same weights. Clients
        leave it empty.
    """

    name: str
    scale: float = 1.0
    digest: str = ""


@dataclass(frozen=True, slots=True)
class VideoOptions:
    """What a request says of a video, beside its shape.

    fps: frames per second of the file.
    guidance_scale_2: of steps that a model's second transformer makes; None is `Request.guidance_scale`.
    boundary_ratio: noise level below which steps are the second transformer's, 0 to 1; None is the checkpoint's own.
    flow_shift: of the schedule's noise levels; None is the checkpoint's own.
    """

    fps: float
    guidance_scale_2: float | None = None
    boundary_ratio: float | None = None
    flow_shift: float | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a request's life.

    kind: its family's name for it, which profiles and reports use too.
    num_steps: of a stage with steps, which tasks divide. 0: a short stage, which is one task.
    num_passes: forwards of the model that each step makes, or the whole of a short stage.
    shape: it takes the time that an output of this shape would; None is the request's own.
    """

    kind: str
    num_steps: int = 0
    num_passes: int = 1
    shape: Shape | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One accepted request: exactly one image (a client's `n` images are n requests).

    `stages` come from the model's family, each of another kind. Times are seconds since the engine started. `priority`
    orders classes, lower is earlier. Texts are padded to `max_sequence_length` tokens and cut at it; None is the
    model's own number. Steps run at one of `degrees`; None leaves every degree of the shape to the policy. Prompts are
    in no `repr`, which logs and tracebacks quote. `media_type` is that of what the last stage leaves. `skipped_steps`
    are those of its schedule that are not made, because the latents start from a picture. `images` are the sizes of the
    pictures that came with the prompt. `lora` is the adapter that its text encoders and steps run with; None is the
    model as it is. `model` is the key of the model that it is for, of those that are served; empty where there is one.
    `video` is there where a video is made.
    """

    request_id: str
    prompt: str = field(repr=False)
    shape: Shape
    stages: tuple[Stage, ...]
    seed: int
    arrival_s: float
    deadline_s: float
    guidance_scale: float = 3.5
    negative_prompt: str | None = field(default=None, repr=False)
    true_cfg_scale: float = 1.0
    priority: int = 0
    max_sequence_length: int | None = None
    degrees: tuple[int, ...] | None = None
    media_type: str = RAW_PIXELS
    skipped_steps: int = 0
    images: tuple[Shape, ...] = ()
    lora: Lora | None = None
    model: str = ""
    video: VideoOptions | None = None

    @property
    def num_steps(self) -> int:
        """Of all stages together."""
        return sum(stage.num_steps for stage in self.stages)

    @property
    def num_schedule_steps(self) -> int:
        """Between which the schedule of noise levels is divided: those that are made, and those that are skipped."""
        return self.num_steps + self.skipped_steps

    def stage_of(self, kind: str) -> Stage:
        """Its stage of this kind, which it must have."""
        return next(stage for stage in self.stages if stage.kind == kind)

    @property
    def stepped(self) -> Stage:
        """The first stage that has steps; without one, the first stage."""
        for stage in self.stages:  # policies ask often: a generator would cost more
            if stage.num_steps:
                return stage
        return self.stages[0]

    @property
    def kind(self) -> tuple[object, ...]:
        """Requests of one kind have the same stages, but for the number of steps, take the same time for each, and run
        with the same adapter.

        Only they may share a task.
        """
        passes = [(stage.kind, stage.num_passes, stage.shape) for stage in self.stages]
        return self.model, self.shape, self.images, self.degrees, self.max_sequence_length, self.lora, *passes

    @property
    def is_exact(self) -> bool:
        """Whether it asks for one degree, and so for the same bits each time: then it shares no task."""
        return self.degrees is not None and len(self.degrees) == 1

    def can_run_on(self, num_ranks: int) -> bool:
        """Whether its steps may run at a degree that so many ranks allow."""
        return self.degrees is None or min(self.degrees) <= num_ranks
