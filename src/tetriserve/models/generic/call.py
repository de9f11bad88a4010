"""One request's call of an unmodified pipeline, made a step at a time, and gone on with in another process.

What of the pipeline is copied and wrapped for it: `course`.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import ENCODE
from tetriserve.models.adapter import Tensors
from tetriserve.models.card import ModelCard
from tetriserve.models.generic.course import DENOISERS, ENCODED, CallCourse
from tetriserve.models.generic.threads import PausingThread
from tetriserve.models.generic.videos import FRAMES, RATES
from tetriserve.models.nesting import named

if TYPE_CHECKING:
    from PIL.Image import Image


class PipelineCall:
    """Pauses after encoding, `steps_done` 0, and after each step; a resumed call begins after `steps_done` steps.

    encoded: what `encode` returned, of any call of the request; without it, texts are encoded.
    stepped: what `stepped_state` returned after `steps_done` steps; with 0 it is not needed.
    """

    def __init__(
        self,
        pipeline: Any,
        card: ModelCard,
        request: Request,
        device: torch.device,
        *,
        encoded: Tensors | None = None,
        stepped: Tensors | None = None,
        steps_done: int = 0,
    ) -> None:
        self.request = request
        self._card = card
        self._course = CallCourse(pipeline, request, encoded, stepped or {}, steps_done)
        course, arguments = self._course, arguments_of(pipeline, card, request)
        self._thread = PausingThread(
            lambda pause: course.run(arguments, pause), device, f"tetriserve-call-{request.request_id}"[:60]
        )

    def is_before(self, stage: str, steps_done: int, request: Request) -> bool:
        """Whether it pauses where this stage of `request` goes on, after `steps_done` steps."""
        if self.is_over or self.request != request:
            return False
        return self.steps_done == steps_done and self._course.is_encoded == (stage != ENCODE)

    @property
    def steps_done(self) -> int:
        return self._course.steps_done

    @property
    def is_over(self) -> bool:
        """Whether it has ended, failed, or was released."""
        return self._thread.has_ended

    @property
    def cpu_s(self) -> float:
        """Processor time that its thread has spent."""
        return self._thread.cpu_s

    def encode(self) -> Tensors:
        """Run until the prompt is encoded: what the pipeline's text encoders made of it, in the order of its calls.

        Raises:
            RuntimeError: no step calls a denoiser.
            Exception: whatever the pipeline raises.
        """
        self._begin()
        return named(self._course.encoded, ENCODED)

    def step(self) -> None:
        """Make one step; a resumed call makes up for what is behind it first.

        Raises:
            RuntimeError: the pipeline ends, or has another number of steps than the request.
            Exception: whatever the pipeline raises.
        """
        before = self.steps_done
        if not self._course.is_encoded:
            self._begin()
        self._thread.go_on()
        if self.is_over or self.steps_done != before + 1:
            raise RuntimeError(f"the pipeline made {self.steps_done} of {self.request.num_steps} steps and ended")

    def stepped_state(self) -> Tensors:
        """`latents` after the last step, in the pipeline's own form, and all else that a resumed call needs."""
        return self._course.state()

    def pictures(self) -> list[Image]:
        """Run to the end, all steps being done: the pipeline's own PIL image, or all frames of its own video.

        Raises:
            RuntimeError: the pipeline makes another step, or its output is of another shape than was asked for.
            Exception: whatever the pipeline raises.
        """
        if not self._course.is_encoded:
            self._begin()
        self._thread.go_on()
        if not self.is_over:
            raise RuntimeError(f"the pipeline makes more steps than the {self.request.num_steps} that were asked for")
        pictures = pictures_of(self._thread.result, self._card)
        drawn, asked = Shape(pictures[0].height, pictures[0].width, len(pictures)), self.request.shape
        if drawn != asked:
            what = "video" if self._card.makes_videos else "picture"
            raise RuntimeError(f"the pipeline drew a {what} of {drawn} where {asked} was asked for")
        return pictures

    def release(self) -> None:
        """End it, and with it its thread. It happens by itself when the last reference to this object is gone."""
        self._thread.release()

    def _begin(self) -> None:
        self._thread.go_on()
        if self.is_over or not self._course.is_encoded:
            raise RuntimeError(f"no step of the pipeline calls its {' or '.join(DENOISERS)}")


def pictures_of(result: Any, card: ModelCard) -> list[Image]:
    """Of what a pipeline returns for one prompt, as a tuple: its picture, or the frames of its video."""
    return list(result[0][0]) if card.makes_videos else [result[0][0]]


def arguments_of(pipeline: Any, card: ModelCard, request: Request) -> dict[str, Any]:
    """Of the pipeline's call, those that the request says something of; the others have the pipeline's defaults."""
    said: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "height": request.shape.height,
        "width": request.shape.width,
        "num_inference_steps": request.num_steps,
        "guidance_scale": request.guidance_scale,
        "true_cfg_scale": request.true_cfg_scale,
        "max_sequence_length": request.max_sequence_length or card.num_text_tokens or None,
    }
    if card.makes_videos:
        said |= dict.fromkeys(FRAMES, request.shape.frames)
        said |= dict.fromkeys(RATES, fps_of(card, request))
    taken = inspect.signature(pipeline.__call__).parameters
    return {name: value for name, value in said.items() if name in taken and value is not None}


def fps_of(card: ModelCard, request: Request) -> float:
    """Frames per second of the request's video."""
    return request.video.fps if request.video else card.default_fps
