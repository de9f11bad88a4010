"""What of a pipeline is copied and wrapped for one call of it, so that it pauses, and goes on in another process.

The pipeline is copied, but for its models, and these of its parts are wrapped: `encode_prompt`, the forward of the
denoiser, and `step` of the scheduler, which is the copy's own. A pipeline that makes video and sound copies its
scheduler: a step is then one step of each. The call pauses before the first forward (then the prompt is encoded) and
after each step.

Elsewhere, the call is made again from its beginning, and what it has behind it costs nothing: `encode_prompt` returns
what was kept, forwards of the steps that are done return zeros, their `step` returns what the last of them returned.
Before the first step that is left, the schedulers' fields and the generator get their state. So the pipeline's own
variables are as they were, but for those that it computes from forwards without the scheduler: whether there are any,
the self-test shows (`adapter`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from diffusers.utils import BaseOutput

from tetriserve.core.request import Request
from tetriserve.models.adapter import Tensors
from tetriserve.models.nesting import named, value_of, with_tensors
from tetriserve.models.schedulers import restore, state_of

DENOISERS = ("transformer", "unet")
"""How the names of components begin that each step calls."""
ENCODED = "encoded"
_LATENTS, _OUTPUTS, _FORWARDS, _GENERATOR = "latents", "outputs", "forwards", "generator"
_WRAPPED = ("step", "__deepcopy__")
"""Of a scheduler, as attributes of the object."""


@dataclass(eq=False)
class _Schedule:
    """One of the call's schedulers.

    prefix: of the names of its state.
    outputs: what its last step returned.
    num_steps: that it has made or left out.
    """

    scheduler: Any
    prefix: str
    outputs: Any = ()
    num_steps: int = 0


class CallCourse:
    """What the wrapped parts of the pipeline's copy do, and what they have seen. Runs in the call's thread."""

    def __init__(
        self, pipeline: Any, request: Request, encoded: Tensors | None, stepped: Tensors, steps_done: int
    ) -> None:
        self.steps_done = self._num_to_skip = steps_done
        self.encoded: list[Any] = []
        self.is_encoded = False
        self._pipeline = pipeline
        self._request = request
        self._schedules: list[_Schedule] = []
        self._stepped = stepped
        self._kept = [] if encoded is None else value_of(encoded, ENCODED)
        self._num_encodes = self._num_skipped = self._num_forwards = 0
        self._forwards: dict[str, list[Any]] = value_of(stepped, _FORWARDS) if steps_done else {}
        self._made: list[Any] = []
        self._generator = torch.Generator("cpu").manual_seed(request.seed)
        self._pause: Callable[[], None] = lambda: None

    def run(self, arguments: Mapping[str, Any], pause: Callable[[], None]) -> Any:
        """What the pipeline returns: a tuple of a list of one picture, or of one list of pictures."""
        self._pause = pause
        own = copied(self._pipeline, self._request)
        self._adopt(own.scheduler)
        parts = vars(own)
        if hasattr(own, "encode_prompt"):
            parts["encode_prompt"] = self._encoding(own.encode_prompt)
        for name in denoisers_of(self._pipeline):
            parts[name] = copy.copy(parts[name])
            parts[name].forward = self._forwarding(parts[name].forward)
        try:
            return own(**arguments, generator=self._generator, output_type="pil", return_dict=False)
        finally:  # schedulers that refer to this object would keep its tensors until garbage is collected
            for schedule in self._schedules:
                for name in _WRAPPED:
                    delattr(schedule.scheduler, name)
            self._schedules, self._pause = [], lambda: None
            self._stepped, self._kept, self.encoded = {}, [], []

    def state(self) -> Tensors:
        """Copies, after a step."""
        state: dict[str, torch.Tensor] = {}
        for schedule in self._schedules:
            latents, others = _parted(schedule.outputs)
            state[schedule.prefix + _LATENTS] = latents.detach().clone()
            state |= named(others, schedule.prefix + _OUTPUTS)
            fields = state_of(schedule.scheduler, self._pipeline.scheduler)
            state |= {schedule.prefix + name: tensor for name, tensor in fields.items()}
        return {**state, **named(self._forwards, _FORWARDS), _GENERATOR: self._generator.get_state()}

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
                return _returned(with_tensors(_zeros, self._forwards[str(number)][self._num_forwards - 1]))
            result = forward(*args, **kwargs)
            self._made.append(with_tensors(_form, _plain(result)))
            return result

        return denoise

    def _adopt(self, scheduler: Any) -> None:
        """Have its steps counted, and those of its copies."""
        number = len(self._schedules)
        schedule = _Schedule(scheduler, f"copies/{number}/" if number else "")
        self._schedules.append(schedule)

        def adopted_copy(memo: dict[int, Any]) -> Any:
            plain = copy.copy(scheduler)
            for name in _WRAPPED:
                delattr(plain, name)
            own = copy.deepcopy(plain, memo)
            self._adopt(own)
            return own

        scheduler.step, scheduler.__deepcopy__ = self._stepping(schedule, scheduler.step), adopted_copy

    def _stepping(self, schedule: _Schedule, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def step_once(*args: Any, **kwargs: Any) -> Any:
            number = self._num_skipped if self._is_skipping else self.steps_done
            if number == self._request.num_steps:
                raise RuntimeError(f"the schedule has more than the {number} steps that were asked for")
            if schedule.num_steps != number:
                raise RuntimeError("the copies of its scheduler do not step by turns")
            result = self._skipped(schedule) if self._is_skipping else step(*args, **kwargs)
            if not isinstance(result, tuple | BaseOutput):
                raise TypeError(f"a step returns {type(result).__name__}, which no state can keep")
            schedule.outputs, schedule.num_steps = result, number + 1
            if all(each.num_steps > number for each in self._schedules):
                self._end_step()
            return result

        return step_once

    def _skipped(self, schedule: _Schedule) -> Any:
        """What the last of the steps that were made before returned."""
        prefix = schedule.prefix
        if schedule.num_steps + 1 == self._num_to_skip:
            own = {name[len(prefix) :]: tensor for name, tensor in self._stepped.items() if name.startswith(prefix)}
            restore(schedule.scheduler, own)
        return _joined(self._stepped[prefix + _LATENTS].clone(), value_of(self._stepped, prefix + _OUTPUTS))

    def _end_step(self) -> None:
        if self._is_skipping:
            self._num_skipped, self._num_forwards = self._num_skipped + 1, 0
            if not self._is_skipping:
                self._generator.set_state(self._stepped[_GENERATOR].cpu())
            return
        self._note_forwards()
        self.steps_done += 1
        self._pause()

    def _note_forwards(self) -> None:
        """The forms of a step's forwards, where they are others than those of the step before."""
        last = [*self._forwards.values()][-1:]
        if not last or [*_shapes(last[0])] != [*_shapes(self._made)]:
            self._forwards[str(self.steps_done)] = self._made
        self._made = []


def copied(pipeline: Any, request: Request) -> Any:
    """Another pipeline of the same models, with a scheduler of its own, and a guider of the request's guidance."""
    own = copy.copy(pipeline)
    # Not by setattr, which would write into the configuration, too.
    parts = vars(own)
    parts["scheduler"] = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    if (guider := getattr(pipeline, "guider", None)) is not None:
        parts["guider"] = copy.deepcopy(guider)
        if hasattr(guider, "guidance_scale"):
            parts["guider"].guidance_scale = request.guidance_scale
    return own


def denoisers_of(pipeline: Any) -> list[str]:
    return [
        name
        for name, part in pipeline.components.items()
        if name.startswith(DENOISERS) and isinstance(part, torch.nn.Module)
    ]


def _parted(outputs: Any) -> tuple[torch.Tensor, Any]:
    """The first of what a step returned, its latents, and the others."""
    if isinstance(outputs, BaseOutput):
        name, *_ = outputs
        return outputs[name], {**outputs, name: None}
    return outputs[0], list(outputs[1:])


def _joined(latents: torch.Tensor, others: Any) -> Any:
    """What `_parted` was given."""
    if isinstance(others, dict):
        return _returned({**others, next(iter(others)): latents})
    return (latents, *others)


def _plain(result: Any) -> Any:
    """An output of diffusers as a dict, which a state can keep."""
    return dict(result) if isinstance(result, BaseOutput) else result


def _returned(plain: Any) -> Any:
    """What `_plain` was given, though not of its class: its fields are read by name, by number and as a dict's."""
    if not isinstance(plain, dict):
        return plain
    output = BaseOutput()
    for name, value in plain.items():
        output[name] = value
    return output


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
