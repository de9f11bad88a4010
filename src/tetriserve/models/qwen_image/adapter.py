"""Qwen-Image: `diffusers.QwenImagePipeline`'s own parts, driven one step at a time.

Suffixes of tensor names: see `models.diffusion`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.transformers import transformer_qwenimage
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift, retrieve_timesteps

from tetriserve.core.events import TextCount
from tetriserve.core.request import Request, Shape
from tetriserve.models.adapter import Tensors
from tetriserve.models.diffusion import Branch, DenoiseLoop, DiffusionAdapter, drawn, num_text_tokens
from tetriserve.models.family import image_tokens
from tetriserve.models.parallel import SequenceParallel

_rotate = transformer_qwenimage.apply_rotary_emb_qwen


class QwenImageAdapter(DiffusionAdapter):
    """Latents are packed: (B, S, 4C). Embeddings are as long as the text: texts of two lengths are two forwards."""

    def encode_prompt(self, prompt: str, length: int) -> dict[str, torch.Tensor]:
        prompt_embeds_BLD, _ = self.pipeline.encode_prompt(prompt, device=self.device, max_sequence_length=length)
        return {"prompt_embeds": prompt_embeds_BLD}

    def text_parts(self, embeds: Tensors) -> Mapping[str, torch.Tensor]:
        return {"text_encoder": embeds["prompt_embeds"]}

    def count_text(self, request: Request) -> TextCount:
        """With the end of the template that the prompt is put into; its beginning is left out by the pipeline too."""
        count = self.num_text_tokens(request.prompt)
        return TextCount(count, count > (request.max_sequence_length or self.card.num_text_tokens))

    def num_text_tokens(self, prompt: str) -> int:
        """Embeddings of a prompt, if none are cut."""
        template: str = self.pipeline.prompt_template_encode
        num_dropped: int = self.pipeline.prompt_template_encode_start_idx
        return num_text_tokens(self.pipeline.tokenizer, template.format(prompt)) - num_dropped

    def noise(self, request: Request, generator: torch.Generator) -> torch.Tensor:
        shape, num_channels = request.shape, self.pipeline.transformer.config.in_channels // 4
        return self.pipeline.prepare_latents(  # type: ignore[no-any-return]
            1, num_channels, shape.height, shape.width, self.dtype, self.device, generator
        )

    def set_timesteps(self, scheduler: Any, request: Request) -> torch.Tensor:
        config, num_steps = scheduler.config, request.num_schedule_steps
        shift = calculate_shift(
            image_tokens(self.card, request.shape),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas_N = np.linspace(1.0, 1 / num_steps, num_steps)
        timesteps_N, _ = retrieve_timesteps(scheduler, num_steps, self.device, sigmas=sigmas_N, mu=shift)
        return timesteps_N  # type: ignore[no-any-return]

    def inputs(self, request: Request, encoded: Tensors) -> list[tuple[int, int, int]]:
        """Frames, height and width in tokens of what the sequence consists of; the output is first."""
        side, shape = self.card.pixels_per_token, request.shape
        return [(1, shape.height // side, shape.width // side)]

    def forward(self, branches: Sequence[Branch]) -> Sequence[torch.Tensor]:
        latents_BSC = torch.cat([branch.latents for branch in branches])
        timesteps_B = torch.stack([branch.loop.timestep for branch in branches])
        velocity_BSC = self.pipeline.transformer(
            hidden_states=latents_BSC,
            timestep=timesteps_B.to(latents_BSC.dtype) / 1000,
            encoder_hidden_states=torch.cat([branch.embeds() for branch in branches]),
            img_shapes=[branch.loop.inputs for branch in branches],
            return_dict=False,
        )[0]
        return velocity_BSC.split(1)  # type: ignore[no-any-return]

    def guide(self, loop: DenoiseLoop, prediction: torch.Tensor, negative: torch.Tensor | None) -> torch.Tensor:
        """Each token is brought back to the norm that it has without guidance."""
        if negative is None:
            return prediction
        guided = super().guide(loop, prediction, negative)
        norms = [torch.norm(each, dim=-1, keepdim=True) for each in (prediction, guided)]
        return guided * (norms[0] / norms[1])  # type: ignore[no-any-return]

    def decode_latents(self, latents: torch.Tensor, shape: Shape) -> torch.Tensor | None:
        pipeline = self.pipeline
        latents_BCTHW = pipeline._unpack_latents(latents, shape.height, shape.width, pipeline.vae_scale_factor)
        mean, std = self._statistics(latents_BCTHW)
        image_BCTHW = pipeline.vae.decode(latents_BCTHW / (1.0 / std) + mean, return_dict=False)[0]
        return None if image_BCTHW is None else image_BCTHW[:, :, 0]

    def encode_pixels(self, image_BCHW: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        latents_BCTHW = drawn(self.pipeline.vae.encode(image_BCHW.unsqueeze(2)).latent_dist, generator)
        mean, std = self._statistics(latents_BCTHW)
        return self.packed((latents_BCTHW - mean) * (1.0 / std))

    def packed(self, latents_BCTHW: torch.Tensor) -> torch.Tensor:
        """(B, S, 4C), of one frame."""
        batch, num_channels, _, height, width = latents_BCTHW.shape
        return self.pipeline._pack_latents(latents_BCTHW, batch, num_channels, height, width)  # type: ignore[no-any-return]

    def sequence_parallel(self) -> SequenceParallel:
        """By diffusers' plan, of which the part for all blocks is for transformers that tell pictures from the output.

        A member without text tokens, of a text shorter than the degree, has none to rotate.
        """
        transformer_qwenimage.apply_rotary_emb_qwen = _rotated
        transformer = self.pipeline.transformer
        ignored = () if transformer.config.zero_cond_t else ("transformer_blocks.*",)
        plan = {name: part for name, part in transformer._cp_plan.items() if name not in ignored}
        return SequenceParallel(transformer, plan)

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's latents by channel, (1, C, 1, 1, 1), as `latents` are."""
        config = self.pipeline.vae.config
        values = [torch.tensor(each).view(1, -1, 1, 1, 1) for each in (config.latents_mean, config.latents_std)]
        mean, std = (each.to(latents.device, latents.dtype) for each in values)
        return mean, std


def _rotated(x: torch.Tensor, freqs_cis: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """In place of `apply_rotary_emb_qwen`, which fails without tokens."""
    return _rotate(x, freqs_cis, *args, **kwargs) if x.shape[1] else x
