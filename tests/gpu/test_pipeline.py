"""The FLUX adapter on a GPU against `FluxPipeline` on it: equal bits at degree 1."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.gloo.test_flux_adapter import call_pipeline
from tetriserve.core.execution import Execution
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.models.card import ModelCard
from tetriserve.models.flux.adapter import FluxAdapter

REQUEST = Request(
    request_id="r",
    prompt="a red circle on a blue background",
    shape=Shape(256, 256),
    stages=image_stages(3),
    seed=7,
    arrival_s=0.0,
    deadline_s=10.0,
)
CASES = {
    "square": REQUEST,
    "wide": dataclasses.replace(REQUEST, shape=Shape(height=256, width=320)),
    "negative prompt": dataclasses.replace(
        REQUEST, stages=image_stages(3, 2), negative_prompt="blurry", true_cfg_scale=3.0
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_and_pixels_are_those_of_the_pipeline_on_the_same_device(
    card: ModelCard, device: str, dtype: str
) -> None:
    from diffusers import FluxPipeline

    adapter = FluxAdapter(dataclasses.replace(card, execution=Execution(dtype)), device)
    pipeline = FluxPipeline.from_pretrained(card.path, dtype=getattr(torch, dtype)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    for name, request in CASES.items():
        loop = adapter.denoise_loop(request, adapter.encode(request), 0)
        latents = adapter.initial_latents(request)
        for _ in range(request.num_steps):
            latents = loop.step(latents)
        assert latents.device.type == device
        assert torch.equal(latents, call_pipeline(pipeline, request, "latent", card.num_text_tokens)), name
        pixels = call_pipeline(pipeline, request, "pil", card.num_text_tokens)[0]
        assert np.array_equal(adapter.decode(request, latents), np.asarray(pixels)), name
