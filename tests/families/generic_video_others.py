"""More tiny random pipelines that make videos; see `generic_video`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.families.case import bundled_tokenizer, randomised, tiny_vae
from tests.families.generic import gemma_tokenizer, t5_encoder
from tests.families.text import qwen_tokenizer


def _umt5(tokenizer: Any) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=len(tokenizer), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return randomised(UMT5EncoderModel(config))


def _wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    return randomised(AutoencoderKLWan(base_dim=4, num_res_blocks=1))


def easyanimate(path: Path) -> None:
    """It fails without a negative prompt."""
    from diffusers import (
        AutoencoderKLMagvit,
        EasyAnimatePipeline,
        EasyAnimateTransformer3DModel,
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content[0].text }}{% endfor %}"
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    vae = AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    transformer = EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, sample_width=8,
        sample_height=8, num_layers=2, mmdit_layers=1, time_embed_dim=8, text_embed_dim=16,
        add_noise_in_inpaint_model=False,
    )  # fmt: skip
    EasyAnimatePipeline(
        vae=randomised(vae),
        text_encoder=randomised(Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))),
        tokenizer=tokenizer,
        transformer=randomised(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    ).save_pretrained(path)


def kandinsky5(path: Path) -> None:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        Kandinsky5T2VPipeline,
        Kandinsky5Transformer3DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer, clip = qwen_tokenizer(), bundled_tokenizer("tokenizer")
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16,
              "fullatt_block_indexes": [0]}  # fmt: skip
    clip_config = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=8, projection_dim=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, out_visual_dim=4, model_dim=32, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
    )  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    Kandinsky5T2VPipeline(
        transformer=randomised(transformer),
        vae=randomised(vae),
        text_encoder=randomised(Qwen2_5_VLForConditionalGeneration(config)),
        tokenizer=tokenizer,
        text_encoder_2=randomised(CLIPTextModel(clip_config)),
        tokenizer_2=clip,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    ).save_pretrained(path)
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["transformers", "Qwen2VLProcessor"]}))


def latte(path: Path) -> None:
    """Its VAE is that of pictures, and its call names frames `video_length`."""
    from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

    tokenizer = bundled_tokenizer("tokenizer_2")
    transformer = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=16, attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, caption_channels=24,
    )  # fmt: skip
    LattePipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer),
        vae=tiny_vae(),
        transformer=randomised(transformer),
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
    ).save_pretrained(path)


def motif_video(path: Path) -> None:
    """A component guides it."""
    from diffusers import (
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        MotifVideoPipeline,
        MotifVideoTransformer3DModel,
    )
    from transformers import T5Gemma2Encoder, T5Gemma2EncoderConfig

    tokenizer = gemma_tokenizer(padding_side="right")
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 2048,
        "dropout_rate": 0.0,
    }  # fmt: skip
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    config = T5Gemma2EncoderConfig(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    transformer = MotifVideoTransformer3DModel(
        in_channels=33, out_channels=16, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, text_embed_dim=16, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    MotifVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=_wan_vae(),
        text_encoder=randomised(T5Gemma2Encoder(config)),
        tokenizer=tokenizer,
        transformer=randomised(transformer),
        guider=ClassifierFreeGuidance(guidance_scale=8.0),
    ).save_pretrained(path)


def skyreels_v2(path: Path) -> None:
    """It needs the package ftfy. Its solver keeps the model's last answers."""
    import diffusers

    tokenizer = bundled_tokenizer("tokenizer_2")
    transformer = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=24, freq_dim=16, ffn_dim=32, num_layers=2,
        rope_max_seq_len=64,
    )  # fmt: skip
    diffusers.SkyReelsV2Pipeline(
        tokenizer=tokenizer,
        text_encoder=_umt5(tokenizer),
        transformer=randomised(transformer),
        vae=_wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
    ).save_pretrained(path)


def animatediff(path: Path) -> None:
    """A U-Net with a motion adapter, which is given its frames as a batch."""
    from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    clip = bundled_tokenizer("tokenizer")
    clip_config = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=16, projection_dim=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, norm_num_groups=4,
    )  # fmt: skip
    motion = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2,
    )  # fmt: skip
    AnimateDiffPipeline(
        vae=tiny_vae(),
        text_encoder=randomised(CLIPTextModel(clip_config)),
        tokenizer=clip,
        unet=randomised(unet),
        motion_adapter=randomised(motion),
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
    ).save_pretrained(path)


def anyflow(path: Path) -> None:
    from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

    tokenizer = bundled_tokenizer("tokenizer_2")
    transformer = AnyFlowTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=24, freq_dim=16, ffn_dim=32, num_layers=2,
        rope_max_seq_len=64,
    )  # fmt: skip
    AnyFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=_umt5(tokenizer),
        transformer=randomised(transformer),
        vae=_wan_vae(),
        scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
    ).save_pretrained(path)
