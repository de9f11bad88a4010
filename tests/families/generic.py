"""Tiny random pipelines of classes that no family knows, laid out as the published ones are, for `--adapter generic`.

Each builder writes a checkpoint and returns the fields of its `tetriserve.json`.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.families.case import bundled_tokenizer, randomised, tiny_vae

Built = Mapping[str, Any]
Build = Callable[[Path], Built]
_SMALL: Built = {"sizes": ["64x64"]}


def gemma_tokenizer(**options: Any) -> Any:
    """Letters, and bytes of all else."""
    from transformers import GemmaTokenizer

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", *string.ascii_letters, *(f"<0x{i:02X}>" for i in range(256))]
    return GemmaTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], **options)


def gemma_encoder(tokenizer: Any) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return randomised(
        Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=512,
                max_position_embeddings=2048,
            )
        )
    )  # fmt: skip


def t5_encoder(tokenizer: Any, width: int = 24) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return randomised(T5EncoderModel(config))


def _sana_parts(scheduler: Any, sample_size: int = 16, **options: Any) -> dict[str, Any]:
    from diffusers import AutoencoderDC, SanaTransformer2DModel

    tokenizer = gemma_tokenizer(padding_side="right")
    per_side = {
        "block_types": "ResBlock",
        "block_out_channels": (4,) * 6,
        "layers_per_block": (1,) * 6,
        "qkv_multiscales": ((),) * 6,
    }
    blocks = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in per_side.items()}
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=4, scaling_factor=0.8, downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        **blocks,
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=sample_size, patch_size=1, mlp_ratio=2.5, **options,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer,
        "text_encoder": gemma_encoder(tokenizer),
        "vae": randomised(vae),
        "transformer": randomised(transformer),
        "scheduler": scheduler,
    }


def sana(path: Path) -> Built:
    """Its solver keeps the model's last answers. Any size is drawn at one near 512x512, and then cut."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0,
        beta_schedule="linear",
    )  # fmt: skip
    SanaPipeline(**_sana_parts(scheduler)).save_pretrained(path)
    return {"sizes": ["512x512"]}


def sana_sprint(path: Path) -> Built:
    """Its scheduler draws noise between steps and returns the picture beside the latents."""
    from diffusers import SanaSprintPipeline, SCMScheduler

    parts = _sana_parts(SCMScheduler(), 32, guidance_embeds=True, qk_norm="rms_norm_across_heads", timestep_scale=1000)
    SanaSprintPipeline(**parts).save_pretrained(path)
    return {"sizes": ["1024x1024"]}


def pixart_sigma(path: Path) -> Built:
    """It cannot be interrupted. Any size is drawn at one near 256x256, and then cut."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    tokenizer = bundled_tokenizer("tokenizer_2")
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=16, caption_channels=24, sample_size=32, interpolation_scale=1, norm_num_groups=4,
        use_additional_conditions=False,
    )  # fmt: skip
    PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer),
        vae=tiny_vae(),
        transformer=randomised(transformer),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear"),
    ).save_pretrained(path)
    return {"sizes": ["256x256"]}


def lumina2(path: Path) -> Built:
    """It cannot be interrupted."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    tokenizer = gemma_tokenizer(padding_side="right")
    transformer = Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(512, 64, 64),
        cap_feat_dim=16,
    )  # fmt: skip
    Lumina2Pipeline(
        transformer=randomised(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=tiny_vae(),
        text_encoder=gemma_encoder(tokenizer),
        tokenizer=tokenizer,
    ).save_pretrained(path)
    return _SMALL


def aura_flow(path: Path) -> Built:
    """It cannot be interrupted."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = bundled_tokenizer("tokenizer_2")
    config = UMT5Config(vocab_size=len(tokenizer), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=16,
        out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=randomised(UMT5EncoderModel(config)),
        vae=tiny_vae(),
        transformer=randomised(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    ).save_pretrained(path)
    return _SMALL


def hidream(path: Path) -> Built:
    """With a VAE of one block: whatever is asked for, it draws 128x128 latents."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        HiDreamImagePipeline,
        HiDreamImageTransformer2DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM

    clip, t5 = bundled_tokenizer("tokenizer"), bundled_tokenizer("tokenizer_2")
    clips = [
        CLIPTextConfig(
            vocab_size=len(clip), hidden_size=width, projection_dim=width, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=248, bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
        )
        for width in (8, 12)
    ]  # fmt: skip
    llama = LlamaConfig(
        vocab_size=len(t5), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=1.5, shift_factor=0.06,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip
    transformer = HiDreamImageTransformer2DModel(
        patch_size=8, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_channels=[24, 24], text_emb_dim=20, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(128, 128), llama_layers=[0, 1],
    )  # fmt: skip
    HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False),
        vae=randomised(vae),
        text_encoder=randomised(CLIPTextModelWithProjection(clips[0])),
        tokenizer=clip,
        text_encoder_2=randomised(CLIPTextModelWithProjection(clips[1])),
        tokenizer_2=clip,
        text_encoder_3=t5_encoder(t5),
        tokenizer_3=t5,
        text_encoder_4=randomised(LlamaForCausalLM(llama)),
        tokenizer_4=t5,
        transformer=randomised(transformer),
    ).save_pretrained(path)
    return {"sizes": ["128x128"]}


def cogview3(path: Path, *, is_stochastic: bool = False) -> Built:
    """With CogVideoX's DPM scheduler, which draws noise, a variable of the loop has the last prediction."""
    from diffusers import (
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        CogView3PlusPipeline,
        CogView3PlusTransformer2DModel,
    )

    tokenizer = bundled_tokenizer("tokenizer_2")
    transformer = CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
        text_embed_dim=24, time_embed_dim=8, condition_dim=4, pos_embed_max_size=16, sample_size=8,
    )  # fmt: skip
    kind = CogVideoXDPMScheduler if is_stochastic else CogVideoXDDIMScheduler
    CogView3PlusPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer),
        vae=tiny_vae(),
        transformer=randomised(transformer),
        scheduler=kind(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    ).save_pretrained(path)
    return _SMALL


def cogview3_dpm(path: Path) -> Built:
    return cogview3(path, is_stochastic=True)


def stable_diffusion(path: Path) -> Built:
    """No transformer, no text length of its own, and noise drawn at each step."""
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = bundled_tokenizer("tokenizer")
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=randomised(CLIPTextModel(clip)),
        tokenizer=tokenizer,
        unet=randomised(unet),
        scheduler=EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)
    return _SMALL


def stable_diffusion_3(path: Path) -> Built:
    from tests.families.sd3 import build

    build(path)
    return _SMALL


def flux(path: Path) -> Built:
    from tests.families.flux import FLUX

    FLUX.build(path)
    return _SMALL
