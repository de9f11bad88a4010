"""FLUX.1 dev, by classes and layout."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.families.case import FamilyCase, bundled_tokenizer, randomised, tiny_vae
from tetriserve.core.request import Request


def build(path: Path, pipeline_class: str = "FluxPipeline") -> None:
    import diffusers
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tokenizer, tokenizer_2 = bundled_tokenizer("tokenizer"), bundled_tokenizer("tokenizer_2")
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    t5 = T5Config(vocab_size=len(tokenizer_2), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    getattr(diffusers, pipeline_class)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae(),
        text_encoder=randomised(CLIPTextModel(clip)),
        tokenizer=tokenizer,
        text_encoder_2=randomised(T5EncoderModel(t5)),
        tokenizer_2=tokenizer_2,
        transformer=randomised(
            FluxTransformer2DModel(
                in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=12, num_attention_heads=4,
                joint_attention_dim=24, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 4, 4),
            )
        ),
    ).save_pretrained(path)  # fmt: skip


def call(pipeline: Any, request: Request, length: int) -> Mapping[str, Any]:
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "true_cfg_scale": request.true_cfg_scale,
        "guidance_scale": request.guidance_scale,
        "height": request.shape.height,
        "width": request.shape.width,
        "max_sequence_length": length,
    }


FLUX = FamilyCase(
    name="flux",
    build=build,
    call=call,
    guided={"negative_prompt": "rain", "true_cfg_scale": 3.0},
    image_to_image="FluxImg2ImgPipeline",
)


def call_kontext(pipeline: Any, request: Request, length: int) -> Mapping[str, Any]:
    """The pipeline brings every size to one area: its default is a million pixels."""
    return {**call(pipeline, request, length), "max_area": request.shape.num_pixels}


FLUX_KONTEXT = FamilyCase(
    name="flux-kontext",
    build=partial(build, pipeline_class="FluxKontextPipeline"),
    call=call_kontext,
    guided=FLUX.guided,
    pictures=((200, 300),),
)
