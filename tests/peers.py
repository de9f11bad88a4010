"""What the load generators of other servers send for text to image, and what they read from the answer.

Facts about vLLM-Omni 0.20 to 0.30 (`benchmarks/diffusion`), SGLang 0.5.23 (`sglang.multimodal_gen.benchmarks`) and
GF-DiT (`benchmarks/diffusion`), November 2026.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

CHAT = "/v1/chat/completions"
IMAGES = "/v1/images/generations"
PROMPT = "Random prompt 0 for benchmarking diffusion models"
NEGATIVE = "Negative prompt 0 for benchmarking diffusion models"
MODEL = "default"
"""What all of them call the model if they are told nothing else."""


@dataclass(frozen=True)
class Ask:
    """One request; `images_of` reads the answer as the client does: files, as many as it counts."""

    name: str
    path: str
    body: Json
    images_of: Callable[[Json], list[bytes]]
    headers: Mapping[str, str] = field(default_factory=dict)
    deadline_s: float | None = None


def images_of_chat(answer: Json) -> list[bytes]:
    """vLLM-Omni's and GF-DiT's: data URLs in the parts of each choice's message."""
    first = answer["choices"][0]["message"]["content"][0]
    durations = first.get("stage_durations") or {}
    assert all(isinstance(duration, float) for duration in durations.values())  # it takes their mean
    assert first.get("peak_memory_mb", 0.0) >= 0  # it compares numbers
    parts = [part for choice in answer["choices"] for part in choice["message"]["content"]]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [base64.b64decode(url.split(",", 1)[1]) for url in urls if url.startswith("data:")]


def images_of_images(answer: Json) -> list[bytes]:
    """All others': base64 in `data`, whose length SGLang's counts, unless `num_outputs` says otherwise."""
    assert "num_outputs" not in answer
    assert answer["usage"].get("peak_memory_mb", 0.0) >= 0
    return [base64.b64decode(item["b64_json"]) for item in answer["data"]]


def _chat(extra_body: Json) -> Json:
    body: Json = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]}
    return body | {"extra_body": extra_body} if extra_body else body


def _images(**fields: object) -> Json:
    return {"model": MODEL, "prompt": PROMPT, "n": 1, "response_format": "b64_json", **fields}


_SCHEDULING = {
    "runtime_v2_priority": 0, "runtime_v2_request_class": "S", "runtime_v2_arrival_ms": 1500.0,
    "runtime_v2_deadline_ms": 61_500.0, "latent_seq_len": 64, "voxels": 65536, "num_steps": 2, "text_seq_len": 64,
    "denoise_chunk_size": 1,
}  # fmt: skip
_EXTRA_ARGS = {"extra_args": json.dumps(_SCHEDULING), "guidance_scale": 4.0, "guidance_scale_2": 4.0}
_VLLM_KEY = {"Authorization": "Bearer EMPTY"}


def asks(size: int) -> list[Ask]:
    """Every kind of request, for images of `size` by `size`."""
    square = {"height": size, "width": size}
    return [
        Ask("vllm-omni", CHAT, _chat({**square, "num_inference_steps": 2}), images_of_chat),
        Ask("vllm-omni without options", CHAT, _chat({}), images_of_chat),
        Ask(
            "vllm-omni with all options",
            CHAT,
            _chat(
                {
                    "negative_prompt": NEGATIVE, **square, "num_frames": 1, "num_inference_steps": 2, "seed": 42,
                    "fps": 16,
                }
            ),
            images_of_chat,
        ),
        Ask(
            "vllm-omni by the images API",
            IMAGES,
            _images(size=f"{size}x{size}", seed=42, num_inference_steps=2, negative_prompt=NEGATIVE),
            images_of_images,
            _VLLM_KEY,
        ),
        Ask(
            "gf-dit with priorities",
            CHAT,
            _chat({**_EXTRA_ARGS, **square, "num_inference_steps": 2, "seed": 42}),
            images_of_chat,
            deadline_s=60.0,
        ),
        Ask(
            "gf-dit by the images API",
            IMAGES,
            _images(size=f"{size}x{size}", num_inference_steps=2, **_EXTRA_ARGS),
            images_of_images,
            _VLLM_KEY,
            deadline_s=60.0,
        ),
        Ask("sglang", IMAGES, _images(size=f"{size}x{size}", num_inference_steps=2), images_of_images),
        Ask("sglang without options", IMAGES, _images(), images_of_images),
        Ask("sglang with several outputs", IMAGES, _images(n=2, size=f"{size}x{size}"), images_of_images),
    ]  # fmt: skip
