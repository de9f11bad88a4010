"""Z-Image, and Z-Image-Turbo: six heads, for the degrees 1, 2 and 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.families.case import FamilyCase, randomised, tiny_vae
from tests.families.text import qwen_tokenizer
from tetriserve.core.request import Request


def build(path: Path, *, shift: float = 6.0) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = qwen_tokenizer()
    qwen = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=tiny_vae(),
        text_encoder=randomised(Qwen3Model(qwen)),
        tokenizer=tokenizer,
        transformer=randomised(
            ZImageTransformer2DModel(
                in_channels=4, dim=48, n_layers=2, n_refiner_layers=2, n_heads=6, n_kv_heads=6, cap_feat_dim=24,
                axes_dims=[4, 2, 2], axes_lens=[600, 64, 64],
            )
        ),
    ).save_pretrained(path)  # fmt: skip


def call(pipeline: Any, request: Request, length: int) -> Mapping[str, Any]:
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "guidance_scale": request.guidance_scale,
        "height": request.shape.height,
        "width": request.shape.width,
        "max_sequence_length": length,
    }


GUIDED = {"guidance_scale": 5.0}
EXTRA = {"a text that fills its tokens": {**GUIDED, "prompt": "red " * 40, "max_sequence_length": 32}}
Z_IMAGE = FamilyCase(
    name="z-image",
    build=build,
    call=call,
    guided=GUIDED,
    degrees=(1, 2, 3),
    image_to_image="ZImageImg2ImgPipeline",
    resizes=False,
    extra=EXTRA,
)
Z_IMAGE_TURBO = replace(Z_IMAGE, name="z-image-turbo", build=partial(build, shift=3.0), extra={})
