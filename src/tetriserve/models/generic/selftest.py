"""Whether a pipeline's call can be left after a step and gone on with: tried once, when it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tetriserve.core.request import Request
from tetriserve.models.adapter import Tensors
from tetriserve.models.card import ModelCard
from tetriserve.models.family import Guidance
from tetriserve.models.generic.call import PipelineCall, arguments_of, pictures_of
from tetriserve.models.generic.course import copied
from tetriserve.models.generic.facts import stages

if TYPE_CHECKING:
    from PIL.Image import Image

_NUM_STEPS = 3
_TEXTS = ("a red circle", "a tan square")


@torch.no_grad()
def problem_of(pipeline: Any, card: ModelCard, device: torch.device) -> str:
    """One line on what speaks against serving `pipeline` by its call; empty if nothing does.

    Three steps at the smallest size, of a video with two latent frames, and the default guidance: by the pipeline
    itself, by a call that pauses after each step, and by a call that goes on from the state after the first. The steps
    of the two calls alternate, so that what they share shows where it changes. All states and pictures, or frames, must
    be equal, bit for bit, and finite.
    """
    try:
        return _problem_of(pipeline, card, device)
    except Exception as error:  # pipelines raise of every kind
        line = next(iter(str(error).strip().splitlines()), "")
        # Names of packages that diffusers imports where they are installed.
        hint = "; is a package of that name missing?" if type(error) is NameError else ""
        return f"it raises {type(error).__name__}: {line}{hint}"


def _problem_of(pipeline: Any, card: ModelCard, device: torch.device) -> str:
    def new_call(**after: Any) -> PipelineCall:
        return PipelineCall(pipeline, card, request, device, **after)

    request = _request(card, _TEXTS[1])
    other = new_call().encode()
    request = _request(card, _TEXTS[0])
    pictures = _pictures(pipeline, card, request)
    call = new_call()
    encoded = call.encode()
    if len(encoded) > 1 and not _difference(encoded, other):
        return f"its text encoders do not tell {' and '.join(map(repr, _TEXTS))} apart"
    call.step()
    state = call.stepped_state()
    resumed = new_call(encoded=encoded, stepped=state, steps_done=1)
    for number in range(1, _NUM_STEPS + 1):
        if bad := next((name for name, each in state.items() if not _is_finite(each)), ""):
            return f"{bad} are not finite after step {number}"
        if number < _NUM_STEPS:
            resumed.step()
            call.step()
            state = call.stepped_state()
            if bad := _difference(state, resumed.stepped_state()):
                return f"after step {number + 1}, {bad} of a call that goes on from the state after step 1 are others"
    decoding = new_call(encoded=encoded, stepped=state, steps_done=_NUM_STEPS)
    for which, what in ((call, "pauses"), (resumed, "goes on from a state"), (decoding, "goes on after its last step")):
        if not np.array_equal(_pixels(which.pictures()), pictures):
            output = "video" if card.makes_videos else "picture"
            return f"the {output} of a call that {what} is not the one that the pipeline makes by itself"
    return ""


def _request(card: ModelCard, prompt: str) -> Request:
    guidance, shape = Guidance(card.default_guidance_scale), min(card.sizes, key=lambda shape: shape.num_pixels)
    return Request(
        request_id="self-test", prompt=prompt, shape=replace(shape, frames=1 + card.frame_step), seed=7,
        arrival_s=0.0, deadline_s=0.0, stages=stages(card, _NUM_STEPS, guidance), guidance_scale=guidance.scale,
    )  # fmt: skip


def _pictures(pipeline: Any, card: ModelCard, request: Request) -> np.ndarray:
    """By the pipeline's own call, with nothing wrapped."""
    arguments = arguments_of(pipeline, card, request)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    own = copied(pipeline, request)
    return _pixels(pictures_of(own(**arguments, generator=generator, output_type="pil", return_dict=False), card))


def _pixels(pictures: Sequence[Image]) -> np.ndarray:
    return np.stack([np.array(picture.convert("RGB")) for picture in pictures])


def _difference(first: Tensors, second: Tensors) -> str:
    """A name under which they are not equal; empty if there is none."""
    names = sorted(first.keys() | second.keys(), key=lambda name: (name != "latents", name))
    return next(
        (name for name in names if not (name in first and name in second and torch.equal(first[name], second[name]))),
        "",
    )


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
