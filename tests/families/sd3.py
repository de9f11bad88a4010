"""Stable Diffusion 3.5 medium, by classes and layout: attention over the image alone in its first block."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.families.case import FamilyCase, bundled_tokenizer, randomised, tiny_vae
from tetriserve.core.request import Request


def build(path: Path, *, has_t5: bool = True) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    tokenizer, tokenizer_3 = bundled_tokenizer("tokenizer"), bundled_tokenizer("tokenizer_2")
    clip = [
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, projection_dim=width, intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for width in (8, 12)
    ]  # fmt: skip
    t5 = T5Config(vocab_size=len(tokenizer_3), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        text_encoder=randomised(CLIPTextModelWithProjection(clip[0])),
        tokenizer=tokenizer,
        text_encoder_2=randomised(CLIPTextModelWithProjection(clip[1])),
        tokenizer_2=tokenizer,
        text_encoder_3=randomised(T5EncoderModel(t5)) if has_t5 else None,
        tokenizer_3=tokenizer_3 if has_t5 else None,
        transformer=randomised(
            SD3Transformer2DModel(
                sample_size=32, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
                num_attention_heads=4, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20,
                pos_embed_max_size=24, dual_attention_layers=(0,), qk_norm="rms_norm",
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
SD3 = FamilyCase(name="sd3", build=build, call=call, guided=GUIDED, image_to_image="StableDiffusion3Img2ImgPipeline")
SD3_WITHOUT_T5 = FamilyCase(
    name="sd3-without-t5",
    build=partial(build, has_t5=False),
    call=call,
    guided=GUIDED,
    image_to_image="StableDiffusion3Img2ImgPipeline",
    absent=("text_encoder_3", "tokenizer_3"),
)
