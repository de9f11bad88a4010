"""FLUX.2 dev, whose text encoder is part of one that reads pictures, and both of klein's models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.families.case import FamilyCase, randomised
from tests.families.text import mistral_tokenizer, qwen_tokenizer
from tetriserve.core.request import Request


def build_dev(path: Path) -> None:
    """The processor of texts and pictures takes torchvision to be made; a checkpoint has its files all the same."""
    from diffusers import Flux2Pipeline
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    tokenizer = mistral_tokenizer([word.strip(".") for word in SYSTEM_MESSAGE.split()])
    mistral = Mistral3Config(
        text_config={
            "model_type": "mistral", "vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 31, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "head_dim": 4,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )  # fmt: skip
    Flux2Pipeline(
        text_encoder=randomised(Mistral3ForConditionalGeneration(mistral)),
        tokenizer=tokenizer,
        **_parts(text_width=3 * 8, guidance_embeds=True),
    ).save_pretrained(path)
    index = json.loads((path / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (path / "model_index.json").write_text(json.dumps(index))
    (path / "tokenizer/processor_config.json").write_text(json.dumps({"processor_class": "PixtralProcessor"}))


def build_klein(path: Path, *, is_distilled: bool) -> None:
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = qwen_tokenizer()
    qwen = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=28, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Flux2KleinPipeline(
        text_encoder=randomised(Qwen3ForCausalLM(qwen)),
        tokenizer=tokenizer,
        is_distilled=is_distilled,
        **_parts(text_width=3 * 8, guidance_embeds=False),
    ).save_pretrained(path)


def _parts(text_width: int, guidance_embeds: bool) -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    vae = randomised(
        AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
            mid_block_add_attention=False,  # over all of a megapixel it takes seconds
        )
    )
    generator = torch.Generator().manual_seed(2)
    vae.bn.running_mean.copy_(torch.randn(16, generator=generator))
    vae.bn.running_var.copy_(0.5 + torch.rand(16, generator=generator))
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=text_width, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"scheduler": scheduler, "vae": vae, "transformer": randomised(transformer)}


def call(pipeline: Any, request: Request, length: int) -> Mapping[str, Any]:
    return {
        "prompt": request.prompt,
        "guidance_scale": request.guidance_scale,
        "height": request.shape.height,
        "width": request.shape.width,
        "max_sequence_length": length,
    }


def tokenizer_of(path: Path) -> Mapping[str, Any]:
    from transformers import AutoTokenizer

    return {"tokenizer": AutoTokenizer.from_pretrained(path / "tokenizer")}


def unpacked(adapter: Any, request: Request, latents: torch.Tensor) -> torch.Tensor:
    """Klein's pipeline returns latents as the VAE takes them."""
    return adapter.unpacked(latents, request.shape)  # type: ignore[no-any-return]


OTHER_SCALE = {"another scale": {"guidance_scale": 2.5}}
PICTURES = ((80, 100), (64, 64), (90, 65), (1030, 1100))
FLUX2_DEV = FamilyCase(
    name="flux2-dev",
    build=build_dev,
    call=call,
    guided=None,
    given=tokenizer_of,
    num_text_tokens=128,
    pictures=PICTURES,
    extra=OTHER_SCALE,
)
FLUX2_KLEIN = FamilyCase(
    name="flux2-klein",
    build=partial(build_klein, is_distilled=True),
    call=call,
    guided=None,
    as_latents=unpacked,
    pictures=PICTURES,
    extra=OTHER_SCALE,
)
FLUX2_KLEIN_BASE = FamilyCase(
    name="flux2-klein-base",
    build=partial(build_klein, is_distilled=False),
    call=call,
    guided={"guidance_scale": 4.0},
    as_latents=unpacked,
    pictures=PICTURES,
)
