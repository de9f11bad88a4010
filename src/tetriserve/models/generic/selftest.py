"""Whether a pipeline's call can be left after a step and gone on with: tried once, when it is loaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tetriserve.core.request import Request
from tetriserve.models.adapter import Tensors
from tetriserve.models.card import ModelCard
from tetriserve.models.family import Guidance
from tetriserve.models.generic.call import PipelineCall, arguments_of, copied
from tetriserve.models.generic.facts import stages

_NUM_STEPS = 3
_TEXTS = ("a red circle", "a tan square")


@torch.no_grad()
def problem_of(pipeline: Any, card: ModelCard, device: torch.device) -> str:
    """One line on what speaks against serving `pipeline` by its call; empty if nothing does.

    Three steps at the smallest size and the default guidance: by the pipeline itself, by a call that pauses after each
    step, and by a call that goes on from the state after the first. The steps of the two calls alternate, so that what
    they share shows where it changes. All states and pictures must be equal, bit for bit, and finite.
    """
    try:
        return _problem_of(pipeline, card, device)
    except Exception as error:  # pipelines raise of every kind
        line = next(iter(str(error).strip().splitlines()), "")
        return f"it raises {type(error).__name__}: {line}"


def _problem_of(pipeline: Any, card: ModelCard, device: torch.device) -> str:
    def new_call(**after: Any) -> PipelineCall:
        return PipelineCall(pipeline, request, card.num_text_tokens, device, **after)

    request = _request(card, _TEXTS[1])
    other = new_call().encode()
    request = _request(card, _TEXTS[0])
    picture = _picture(pipeline, request, card.num_text_tokens)
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
        if not np.array_equal(which.picture(), picture):
            return f"the picture of a call that {what} is not the one that the pipeline makes by itself"
    return ""


def _request(card: ModelCard, prompt: str) -> Request:
    guidance = Guidance(card.default_guidance_scale)
    return Request(
        request_id="self-test", prompt=prompt, shape=min(card.sizes, key=lambda shape: shape.num_pixels), seed=7,
        arrival_s=0.0, deadline_s=0.0, stages=stages(card, _NUM_STEPS, guidance), guidance_scale=guidance.scale,
    )  # fmt: skip


def _picture(pipeline: Any, request: Request, num_text_tokens: int) -> np.ndarray:
    """By the pipeline's own call, with nothing wrapped."""
    arguments = arguments_of(pipeline, request, num_text_tokens)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    return np.array(copied(pipeline)(**arguments, generator=generator, output_type="pil").images[0].convert("RGB"))


def _difference(first: Tensors, second: Tensors) -> str:
    """A name under which they are not equal; empty if there is none."""
    names = sorted(first.keys() | second.keys(), key=lambda name: (name != "latents", name))
    return next(
        (name for name in names if not (name in first and name in second and torch.equal(first[name], second[name]))),
        "",
    )


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
