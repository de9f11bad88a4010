"""One request's call of an unmodified pipeline, made a step at a time, and gone on with in another process.

The pipeline is copied, but for its models, and four of its parts are wrapped: `encode_prompt`, the forward of the
denoiser, the scheduler's `step`, and the scheduler itself is the copy's own. The call pauses before the first forward
(then the prompt is encoded) and after each step.

Elsewhere, the call is made again from its beginning, and what it has behind it costs nothing: `encode_prompt` returns
what was kept, forwards of the steps that are done return zeros, their `step` returns what the last of them returned.
Before the first step that is left, the scheduler's fields and the generator get their state. So the pipeline's own
variables are as they were, but for those that it computes from forwards without the scheduler: whether there are any,
the self-test shows (`adapter`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import numpy as np
import torch

from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import ENCODE
from tetriserve.models.adapter import Tensors
from tetriserve.models.generic.threads import PausingThread
from tetriserve.models.nesting import named, value_of, with_tensors
from tetriserve.models.schedulers import restore, state_of

DENOISERS = ("transformer", "unet")
"""How the names of components begin that each step calls."""
_ENCODED, _OUTPUTS, _FORWARDS, _GENERATOR = "encoded", "outputs", "forwards", "generator"


class PipelineCall:
    """Pauses after encoding, `steps_done` 0, and after each step; a resumed call begins after `steps_done` steps.

    encoded: what `encode` returned, of any call of the request; without it, texts are encoded.
    stepped: what `stepped_state` returned after `steps_done` steps; with 0 it is not needed.
    """

    def __init__(
        self,
        pipeline: Any,
        request: Request,
        num_text_tokens: int,
        device: torch.device,
        *,
        encoded: Tensors | None = None,
        stepped: Tensors | None = None,
        steps_done: int = 0,
    ) -> None:
        self.request = request
        self._course = _Course(pipeline, request, encoded, stepped or {}, steps_done)
        course, arguments = self._course, arguments_of(pipeline, request, num_text_tokens)
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
        return named(self._course.encoded, _ENCODED)

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

    def picture(self) -> np.ndarray:
        """Run to the end, all steps being done: pixels (H, W, 3), uint8, of the pipeline's own PIL image.

        Raises:
            RuntimeError: the pipeline makes another step, or a picture of another size than was asked for.
            Exception: whatever the pipeline raises.
        """
        if not self._course.is_encoded:
            self._begin()
        self._thread.go_on()
        if not self.is_over:
            raise RuntimeError(f"the pipeline makes more steps than the {self.request.num_steps} that were asked for")
        pixels = np.array(self._thread.result[0][0].convert("RGB"))
        if (drawn := Shape(*pixels.shape[:2])) != self.request.shape:
            raise RuntimeError(f"the pipeline drew a picture of {drawn} where {self.request.shape} was asked for")
        return pixels

    def release(self) -> None:
        """End it, and with it its thread. It happens by itself when the last reference to this object is gone."""
        self._thread.release()

    def _begin(self) -> None:
        self._thread.go_on()
        if self.is_over or not self._course.is_encoded:
            raise RuntimeError(f"no step of the pipeline calls its {' or '.join(DENOISERS)}")


class _Course:
    """What the wrapped parts of the pipeline's copy do, and what they have seen. Runs in the call's thread."""

    def __init__(
        self, pipeline: Any, request: Request, encoded: Tensors | None, stepped: Tensors, steps_done: int
    ) -> None:
        self.steps_done = self._num_to_skip = steps_done
        self.encoded: list[Any] = []
        self.is_encoded = False
        self._pipeline = pipeline
        self._scheduler: Any = None
        self._num_steps = request.num_steps
        self._stepped = stepped
        self._kept = [] if encoded is None else value_of(encoded, _ENCODED)
        self._num_encodes = self._num_skipped = self._num_forwards = 0
        self._outputs: tuple[Any, ...] = ()
        self._forwards: dict[str, list[Any]] = value_of(stepped, _FORWARDS) if steps_done else {}
        self._made: list[Any] = []
        self._generator = torch.Generator("cpu").manual_seed(request.seed)
        self._pause: Callable[[], None] = lambda: None

    def run(self, arguments: Mapping[str, Any], pause: Callable[[], None]) -> Any:
        """What the pipeline returns: a tuple of a list of one picture."""
        self._pause = pause
        own = copied(self._pipeline)
        self._scheduler, parts = own.scheduler, vars(own)
        self._scheduler.step = self._stepping(self._scheduler.step)
        if hasattr(own, "encode_prompt"):
            parts["encode_prompt"] = self._encoding(own.encode_prompt)
        for name in denoisers_of(self._pipeline):
            parts[name] = copy.copy(parts[name])
            parts[name].forward = self._forwarding(parts[name].forward)
        try:
            return own(**arguments, generator=self._generator, output_type="pil", return_dict=False)
        finally:  # a scheduler that refers to this object would keep its tensors until garbage is collected
            self._scheduler, self._pause = None, lambda: None
            self._stepped, self._outputs, self._kept, self.encoded = {}, (), [], []

    def state(self) -> Tensors:
        """Copies, after a step."""
        return {
            "latents": self._outputs[0].detach().clone(),
            **named(list(self._outputs[1:]), _OUTPUTS),
            **named(self._forwards, _FORWARDS),
            _GENERATOR: self._generator.get_state(),
            **state_of(self._scheduler, self._pipeline.scheduler),
        }

    @property
    def _is_skipping(self) -> bool:
        """Whether this step was made before, by another call."""
        return self._num_skipped < self._num_to_skip

    def _encoding(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(encode)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            self._num_encodes += 1
            if self._num_encodes <= len(self._kept):
                return self._kept[self._num_encodes - 1]
            result = encode(*args, **kwargs)
            self.encoded.append(with_tensors(torch.clone, result))
            return result

        return encode_prompt

    def _forwarding(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def denoise(*args: Any, **kwargs: Any) -> Any:
            if not self.is_encoded:
                self.is_encoded = True
                self._pause()
            if self._is_skipping:
                self._num_forwards += 1
                number = max(int(first) for first in self._forwards if int(first) <= self._num_skipped)
                return with_tensors(_zeros, self._forwards[str(number)][self._num_forwards - 1])
            result = forward(*args, **kwargs)
            self._made.append(with_tensors(_form, result))
            return result

        return denoise

    def _stepping(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def step_once(*args: Any, **kwargs: Any) -> Any:
            if self._is_skipping:
                self._num_skipped, self._num_forwards = self._num_skipped + 1, 0
                if self._num_skipped == self._num_to_skip:
                    restore(self._scheduler, self._stepped)
                    self._generator.set_state(self._stepped[_GENERATOR].cpu())
                return (self._stepped["latents"].clone(), *value_of(self._stepped, _OUTPUTS))
            if self.steps_done == self._num_steps:
                raise RuntimeError(f"the schedule has more than the {self._num_steps} steps that were asked for")
            result = step(*args, **kwargs)
            if type(result) is not tuple:
                raise TypeError(f"a step returns {type(result).__name__}, which no state can keep")
            self._note_forwards()
            self._outputs = result
            self.steps_done += 1
            self._pause()
            return result

        return step_once

    def _note_forwards(self) -> None:
        """The forms of a step's forwards, where they are others than those of the step before."""
        last = [*self._forwards.values()][-1:]
        if not last or [*_shapes(last[0])] != [*_shapes(self._made)]:
            self._forwards[str(self.steps_done)] = self._made
        self._made = []


def copied(pipeline: Any) -> Any:
    """Another pipeline of the same models, with a scheduler of its own."""
    own = copy.copy(pipeline)
    # Not by setattr, which would write into the configuration, too.
    vars(own)["scheduler"] = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    return own


def denoisers_of(pipeline: Any) -> list[str]:
    return [
        name
        for name, part in pipeline.components.items()
        if name.startswith(DENOISERS) and isinstance(part, torch.nn.Module)
    ]


def arguments_of(pipeline: Any, request: Request, num_text_tokens: int) -> dict[str, Any]:
    """Of the pipeline's call, those that the request says something of; the others have the pipeline's defaults."""
    said = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "height": request.shape.height,
        "width": request.shape.width,
        "num_inference_steps": request.num_steps,
        "guidance_scale": request.guidance_scale,
        "true_cfg_scale": request.true_cfg_scale,
        "max_sequence_length": request.max_sequence_length or num_text_tokens,
    }
    taken = inspect.signature(pipeline.__call__).parameters
    return {name: value for name, value in said.items() if name in taken and value is not None}


def _form(tensor: torch.Tensor) -> torch.Tensor:
    """Its dtype, device and shape, in a tensor of no bytes."""
    return tensor.new_empty((0, *tensor.shape))


def _zeros(form: torch.Tensor) -> torch.Tensor:
    return form.new_zeros(form.shape[1:])


def _shapes(value: Any) -> list[tuple[Any, ...]]:
    """Of the tensors in it, with their dtypes."""
    shapes: list[tuple[Any, ...]] = []
    with_tensors(lambda tensor: shapes.append((tensor.shape, tensor.dtype)) or tensor, value)  # type: ignore[func-returns-value]
    return shapes
