"""FLUX.1: `diffusers.FluxPipeline`'s own parts, driven one step at a time.

Suffixes of tensor names: see `models.diffusion`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from tetriserve.core.events import TextCount
from tetriserve.core.request import Request, Shape
from tetriserve.models.adapter import Tensors
from tetriserve.models.diffusion import Branch, DiffusionAdapter, drawn, num_text_tokens


@dataclass(frozen=True)
class Inputs:
    """Positions of image and text tokens, and the scale of distilled guidance."""

    img_ids_SA: torch.Tensor
    txt_ids_LA: torch.Tensor
    guidance_B: torch.Tensor | None


class FluxAdapter(DiffusionAdapter):
    """Latents are packed: (B, S, 4C)."""

    def encode_prompt(self, prompt: str, length: int) -> dict[str, torch.Tensor]:
        prompt_embeds_BLD, pooled_prompt_embeds_BD, _ = self.pipeline.encode_prompt(
            prompt, device=self.device, max_sequence_length=length
        )
        return {"prompt_embeds": prompt_embeds_BLD, "pooled_prompt_embeds": pooled_prompt_embeds_BD}

    def text_parts(self, embeds: Tensors) -> Mapping[str, torch.Tensor]:
        return {"text_encoder": embeds["pooled_prompt_embeds"], "text_encoder_2": embeds["prompt_embeds"]}

    def count_text(self, request: Request) -> TextCount:
        """By the tokenizer of the T5 encoder; CLIP's, of which only a summary is used, cuts most texts earlier."""
        length = request.max_sequence_length or self.card.num_text_tokens
        num_tokens = num_text_tokens(self.pipeline.tokenizer_2, request.prompt)
        num_clip_tokens = num_text_tokens(self.pipeline.tokenizer, request.prompt)
        is_cut = num_tokens > length or num_clip_tokens > self.pipeline.tokenizer_max_length
        return TextCount(num_tokens, is_cut)

    def noise(self, request: Request, generator: torch.Generator) -> torch.Tensor:
        shape, num_channels = request.shape, self.pipeline.transformer.config.in_channels // 4
        latents_BSC, _ = self.pipeline.prepare_latents(
            1, num_channels, shape.height, shape.width, self.dtype, self.device, generator
        )
        return latents_BSC  # type: ignore[no-any-return]

    def set_timesteps(self, scheduler: Any, request: Request) -> torch.Tensor:
        config, num_steps = scheduler.config, request.num_schedule_steps
        shift = calculate_shift(
            self._num_tokens(request.shape),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas_N = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / num_steps, num_steps)
        timesteps_N, _ = retrieve_timesteps(scheduler, num_steps, self.device, sigmas=sigmas_N, mu=shift)
        return timesteps_N  # type: ignore[no-any-return]

    def inputs(self, request: Request, encoded: Tensors) -> Inputs:
        img_ids_SA = self._image_ids(request.shape)
        txt_ids_LA = torch.zeros(encoded["prompt_embeds"].shape[1], 3, device=self.device, dtype=self.dtype)
        guidance_B = None
        if self.pipeline.transformer.config.guidance_embeds:
            guidance_B = torch.full([1], request.guidance_scale, device=self.device, dtype=torch.float32)
        return Inputs(img_ids_SA, txt_ids_LA, guidance_B)

    def forward(self, branches: Sequence[Branch]) -> Sequence[torch.Tensor]:
        latents_BSC = torch.cat([branch.latents for branch in branches])
        timesteps_B = torch.stack([branch.loop.timestep for branch in branches])
        inputs: list[Inputs] = [branch.loop.inputs for branch in branches]
        guidances = [each.guidance_B for each in inputs if each.guidance_B is not None]
        velocity_BSC = self.pipeline.transformer(
            hidden_states=latents_BSC,
            timestep=timesteps_B.to(latents_BSC.dtype) / 1000,
            guidance=torch.cat(guidances) if guidances else None,
            pooled_projections=torch.cat([branch.embeds("pooled_prompt_embeds") for branch in branches]),
            encoder_hidden_states=torch.cat([branch.embeds() for branch in branches]),
            txt_ids=inputs[0].txt_ids_LA,
            img_ids=inputs[0].img_ids_SA,
            return_dict=False,
        )[0]
        return velocity_BSC.split(1)  # type: ignore[no-any-return]

    def decode_latents(self, latents: torch.Tensor, shape: Shape) -> torch.Tensor | None:
        pipeline, vae = self.pipeline, self.pipeline.vae
        latents_BCHW = pipeline._unpack_latents(latents, shape.height, shape.width, pipeline.vae_scale_factor)
        latents_BCHW = latents_BCHW / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(latents_BCHW, return_dict=False)[0]  # type: ignore[no-any-return]

    def encode_pixels(self, image_BCHW: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        vae = self.pipeline.vae
        latents_BCHW = drawn(vae.encode(image_BCHW).latent_dist, generator)
        latents_BCHW = (latents_BCHW - vae.config.shift_factor) * vae.config.scaling_factor
        return self.pipeline._pack_latents(latents_BCHW, *latents_BCHW.shape)  # type: ignore[no-any-return]

    def _image_ids(self, shape: Shape) -> torch.Tensor:
        """Positions of the tokens (S, A)."""
        side = self.card.pixels_per_token
        return self.pipeline._prepare_latent_image_ids(  # type: ignore[no-any-return]
            1, shape.height // side, shape.width // side, self.device, self.dtype
        )

    def _num_tokens(self, shape: Shape) -> int:
        side = self.card.pixels_per_token
        return (shape.height // side) * (shape.width // side)
