"""Tiny random pipelines that make videos, laid out as the published ones are, for `--adapter generic`.

Each builder writes a checkpoint. Its VAE has as many frames and pixels to a latent as the published one where that
costs little.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.families.case import bundled_tokenizer, randomised
from tests.families.generic import gemma_tokenizer, t5_encoder


def _trained_tokenizer(texts: Sequence[str], **options: Any) -> Any:
    """Makes one token of each word of `texts`, so that templates are not longer than with the published vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=0, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False, special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
    )  # fmt: skip
    words.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options
    )


def cogvideox(path: Path, *, is_stochastic: bool = False) -> None:
    """With its DPM scheduler, which draws noise, a variable of the loop has the last prediction."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    tokenizer = bundled_tokenizer("tokenizer_2")
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=24, num_layers=2, sample_width=4, sample_height=4, sample_frames=9,
    )  # fmt: skip
    kind = CogVideoXDPMScheduler if is_stochastic else CogVideoXDDIMScheduler
    CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer),
        vae=randomised(vae),
        transformer=randomised(transformer),
        scheduler=kind(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    ).save_pretrained(path)


def cogvideox_dpm(path: Path) -> None:
    cogvideox(path, is_stochastic=True)


def ltx(path: Path) -> None:
    """Its decoder is told a noise level, and draws noise for it."""
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    tokenizer = bundled_tokenizer("tokenizer_2")
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, timestep_conditioning=True,
    )  # fmt: skip
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=24,
    )  # fmt: skip
    LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1, base_image_seq_len=1024,
            max_image_seq_len=4096,
        ),
        vae=randomised(vae),
        text_encoder=t5_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=randomised(transformer),
    ).save_pretrained(path)  # fmt: skip


def ltx2(path: Path) -> None:
    """Makes sound, too, by a copy of its scheduler; three guidances take three forwards of each step."""
    from diffusers import (
        AutoencoderKLLTX2Audio,
        AutoencoderKLLTX2Video,
        FlowMatchEulerDiscreteScheduler,
        LTX2Pipeline,
        LTX2VideoTransformer3DModel,
    )
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = gemma_tokenizer(padding_side="left")
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 2048,
    }  # fmt: skip
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    vae = AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4, spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )  # fmt: skip
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8,
    )  # fmt: skip
    transformer = LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_type="split", rope_double_precision=False,
    )  # fmt: skip
    connector = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    connectors = LTX2TextConnectors(
        caption_channels=16, text_proj_in_factor=3, connector_rope_base_seq_len=32, rope_type="split",
        rope_double_precision=False,
        **{f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in connector.items()},
    )  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=16, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )  # fmt: skip
    LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1, base_image_seq_len=1024,
            max_image_seq_len=4096,
        ),
        vae=randomised(vae),
        audio_vae=randomised(audio_vae),
        text_encoder=randomised(Gemma3ForConditionalGeneration(config)),
        tokenizer=tokenizer,
        connectors=randomised(connectors),
        transformer=randomised(transformer),
        vocoder=randomised(vocoder),
    ).save_pretrained(path)  # fmt: skip


def hunyuan_video(path: Path) -> None:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    tokenizer, clip = _trained_tokenizer([DEFAULT_PROMPT_TEMPLATE["template"]]), bundled_tokenizer("tokenizer")
    llama = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    clip_config = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=8, projection_dim=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=24, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    HunyuanVideoPipeline(
        text_encoder=randomised(LlamaModel(llama)),
        tokenizer=tokenizer,
        transformer=randomised(transformer),
        vae=randomised(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=randomised(CLIPTextModel(clip_config)),
        tokenizer_2=clip,
    ).save_pretrained(path)


def hunyuan_video_15(path: Path) -> None:
    """A component guides it, with a scale that its call does not take."""
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    from tests.families.text import qwen_tokenizer

    tokenizer, bytes_tokenizer = qwen_tokenizer(), ByT5Tokenizer()
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1, downsample_match_channel=False,
        upsample_match_channel=False,
    )  # fmt: skip
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=1, attention_head_dim=16, num_layers=1,
        num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=24, image_embed_dim=8, rope_axes_dim=(4, 6, 6),
        task_type="t2v",
    )  # fmt: skip
    HunyuanVideo15Pipeline(
        text_encoder=randomised(Qwen2_5_VLTextModel(qwen)),
        tokenizer=tokenizer,
        transformer=randomised(transformer),
        vae=randomised(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=t5_encoder(bytes_tokenizer),
        tokenizer_2=bytes_tokenizer,
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    ).save_pretrained(path)


def mochi(path: Path) -> None:
    """Six frames share a latent frame."""
    from diffusers import (
        AutoencoderKLMochi,
        FlowMatchEulerDiscreteScheduler,
        MochiPipeline,
        MochiTransformer3DModel,
    )

    tokenizer = bundled_tokenizer("tokenizer_2")
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5,
    )  # fmt: skip
    transformer = MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=12,
        text_embed_dim=24, time_embed_dim=4,
    )  # fmt: skip
    MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=randomised(vae),
        text_encoder=t5_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=randomised(transformer),
    ).save_pretrained(path)


def wan(path: Path) -> None:
    """Of two transformers; its solver keeps the model's last answers."""
    from tetriserve.examples.small_wan import build

    build(path, "t2v-a14b")
    (path / "tetriserve.json").unlink()
