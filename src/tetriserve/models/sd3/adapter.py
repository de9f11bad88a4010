"""Stable Diffusion 3 and 3.5: `diffusers.StableDiffusion3Pipeline`'s own parts, driven one step at a time.

Suffixes of tensor names: see `models.diffusion`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift, retrieve_timesteps

from tetriserve.core.events import TextCount
from tetriserve.core.request import Request, Shape
from tetriserve.models.adapter import Tensors
from tetriserve.models.diffusion import NEGATIVE, PROMPT, Branch, DenoiseLoop, DiffusionAdapter, drawn, num_text_tokens
from tetriserve.models.execution import backend_of
from tetriserve.models.parallel import IMAGE, TEXT, SequenceParallel
from tetriserve.models.sd3.attention import JointAttention

_PLAN = {
    "transformer_blocks.0": {
        "hidden_states": ContextParallelInput(split_dim=1, expected_dims=3),
        "encoder_hidden_states": ContextParallelInput(split_dim=1, expected_dims=3),
    },
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


class SD3Adapter(DiffusionAdapter):
    """Latents are (B, C, H, W), of a side 1 / 8 of the image's."""

    passes = (NEGATIVE, PROMPT)
    joins_passes = True

    def encode_prompt(self, prompt: str, length: int) -> dict[str, torch.Tensor]:
        prompt_embeds_BLD, _, pooled_prompt_embeds_BD, _ = self.pipeline.encode_prompt(
            prompt, None, None, self.device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"prompt_embeds": prompt_embeds_BLD, "pooled_prompt_embeds": pooled_prompt_embeds_BD}

    def text_parts(self, embeds: Tensors) -> Mapping[str, torch.Tensor]:
        """CLIP's tokens stand before T5's; of their summaries, one follows the other."""
        width = self.pipeline.text_encoder.config.projection_dim
        return {
            "text_encoder": embeds["pooled_prompt_embeds"][:, :width],
            "text_encoder_2": embeds["pooled_prompt_embeds"][:, width:],
            "text_encoder_3": embeds["prompt_embeds"][:, self.pipeline.tokenizer_max_length :],
        }

    def count_text(self, request: Request) -> TextCount:
        """By T5's tokenizer where there is one; CLIP's cut most texts earlier."""
        pipeline = self.pipeline
        num_clip_tokens = num_text_tokens(pipeline.tokenizer, request.prompt)
        is_cut = num_clip_tokens > pipeline.tokenizer_max_length
        if pipeline.text_encoder_3 is None:
            return TextCount(num_clip_tokens, is_cut)
        num_tokens = num_text_tokens(pipeline.tokenizer_3, request.prompt)
        return TextCount(num_tokens, is_cut or num_tokens > (request.max_sequence_length or self.card.num_text_tokens))

    def noise(self, request: Request, generator: torch.Generator) -> torch.Tensor:
        shape, num_channels = request.shape, self.pipeline.transformer.config.in_channels
        return self.pipeline.prepare_latents(  # type: ignore[no-any-return]
            1, num_channels, shape.height, shape.width, self.dtype, self.device, generator
        )

    def set_timesteps(self, scheduler: Any, request: Request) -> torch.Tensor:
        config, side = scheduler.config, self.card.pixels_per_token
        shift = {}
        if config.get("use_dynamic_shifting", None):
            shift["mu"] = calculate_shift(
                (request.shape.height // side) * (request.shape.width // side),
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.16),
            )
        timesteps_N, _ = retrieve_timesteps(scheduler, request.num_schedule_steps, self.device, **shift)
        return timesteps_N  # type: ignore[no-any-return]

    def forward(self, branches: Sequence[Branch]) -> Sequence[torch.Tensor]:
        velocity_BCHW = self.pipeline.transformer(
            hidden_states=torch.cat([branch.latents for branch in branches]),
            timestep=torch.stack([branch.loop.timestep for branch in branches]),
            encoder_hidden_states=torch.cat([branch.embeds() for branch in branches]),
            pooled_projections=torch.cat([branch.embeds("pooled_prompt_embeds") for branch in branches]),
            return_dict=False,
        )[0]
        return velocity_BCHW.split(1)  # type: ignore[no-any-return]

    def guide(self, loop: DenoiseLoop, prediction: torch.Tensor, negative: torch.Tensor | None) -> torch.Tensor:
        if negative is None:
            return prediction
        return negative + loop.request.guidance_scale * (prediction - negative)

    def decode_latents(self, latents: torch.Tensor, shape: Shape) -> torch.Tensor | None:
        vae = self.pipeline.vae
        latents_BCHW = latents / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(latents_BCHW, return_dict=False)[0]  # type: ignore[no-any-return]

    def encode_pixels(self, image_BCHW: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        vae = self.pipeline.vae
        latents_BCHW = drawn(vae.encode(image_BCHW).latent_dist, generator)
        return (latents_BCHW - vae.config.shift_factor) * vae.config.scaling_factor  # type: ignore[no-any-return]

    def sequence_parallel(self) -> SequenceParallel:
        """By attention processors of our own: diffusers' know of no division."""
        transformer = self.pipeline.transformer
        transformer.set_attn_processor(
            {name: JointAttention(backend_of(self.card.execution)) for name in transformer.attn_processors}
        )
        return SequenceParallel(
            transformer, _PLAN, lambda attention: (IMAGE,) if attention.endswith(".attn2") else (IMAGE, TEXT)
        )
