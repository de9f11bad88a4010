"""Z-Image: `diffusers.ZImagePipeline`'s own parts, driven one step at a time.

Suffixes of tensor names: see `models.diffusion`; F is frames, of which an image is one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.pipelines.z_image.pipeline_z_image import (
    calculate_shift,
    get_default_z_image_sigmas,
    retrieve_timesteps,
)

from tetriserve.core.events import TextCount
from tetriserve.core.request import Request, Shape
from tetriserve.models.adapter import Tensors
from tetriserve.models.diffusion import Branch, DenoiseLoop, DiffusionAdapter, drawn, num_text_tokens
from tetriserve.models.execution import takes_masks
from tetriserve.models.parallel import SequenceParallel

_TOKENS = "x"
"""What the transformer's layers call them."""
_NUM_TRAIN_STEPS = 1000
_TEXT_MULTIPLE = 32


class ZImageAdapter(DiffusionAdapter):
    """Latents are (B, C, H, W), of a side 1 / 8 of the image's, in float32 whatever the model's dtype."""

    joins_passes = True
    num_template_tokens = 16

    def encode_prompt(self, prompt: str, length: int) -> dict[str, torch.Tensor]:
        """As many tokens as the text has: (L, D)."""
        [prompt_embeds_LD], _ = self.pipeline.encode_prompt(
            prompt, self.device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"prompt_embeds": prompt_embeds_LD}

    def text_parts(self, embeds: Tensors) -> Mapping[str, torch.Tensor]:
        return {"text_encoder": embeds["prompt_embeds"]}

    def count_text(self, request: Request) -> TextCount:
        """With the chat template, which stands around the prompt."""
        tokenizer, messages = self.pipeline.tokenizer, [{"role": "user", "content": request.prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        num_tokens = num_text_tokens(tokenizer, text)
        return TextCount(num_tokens, num_tokens > (request.max_sequence_length or self.card.num_text_tokens))

    def noise(self, request: Request, generator: torch.Generator) -> torch.Tensor:
        """What starts from a picture starts in the model's dtype."""
        shape, num_channels = request.shape, self.pipeline.transformer.in_channels
        dtype = self.dtype if request.images else torch.float32
        return self.pipeline.prepare_latents(  # type: ignore[no-any-return]
            1, num_channels, shape.height, shape.width, dtype, self.device, generator
        )

    def set_timesteps(self, scheduler: Any, request: Request) -> torch.Tensor:
        config, side, num_steps = scheduler.config, self.card.pixels_per_token, request.num_schedule_steps
        shift = calculate_shift(
            (request.shape.height // side) * (request.shape.width // side),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas_N = get_default_z_image_sigmas(num_steps)
        timesteps_N, _ = retrieve_timesteps(scheduler, num_steps, self.device, sigmas=sigmas_N, mu=shift)
        return timesteps_N  # type: ignore[no-any-return]

    def kind(self, branch: Branch) -> Hashable:
        """Texts of any lengths go together, under a mask where a kernel takes one."""
        if takes_masks(self.card.execution):
            return branch.latents.shape
        return branch.latents.shape, -(len(branch.embeds()) // -_TEXT_MULTIPLE)

    def forward(self, branches: Sequence[Branch]) -> Sequence[torch.Tensor]:
        transformer = self.pipeline.transformer
        timesteps_B = torch.stack([branch.loop.timestep for branch in branches])
        velocities_CFHW = transformer(
            [branch.latents.to(transformer.dtype).transpose(0, 1) for branch in branches],
            (_NUM_TRAIN_STEPS - timesteps_B) / _NUM_TRAIN_STEPS,
            [branch.embeds() for branch in branches],
            return_dict=False,
        )[0]
        return [-velocity_CFHW.float().transpose(0, 1) for velocity_CFHW in velocities_CFHW]

    def guide(self, loop: DenoiseLoop, prediction: torch.Tensor, negative: torch.Tensor | None) -> torch.Tensor:
        if negative is None:
            return prediction
        return prediction + loop.request.guidance_scale * (prediction - negative)

    def decode_latents(self, latents: torch.Tensor, shape: Shape) -> torch.Tensor | None:
        vae = self.pipeline.vae
        latents_BCHW = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(latents_BCHW, return_dict=False)[0]  # type: ignore[no-any-return]

    def encode_pixels(self, image_BCHW: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        vae = self.pipeline.vae
        latents_BCHW = drawn(vae.encode(image_BCHW).latent_dist, generator)
        return (latents_BCHW - vae.config.shift_factor) * vae.config.scaling_factor  # type: ignore[no-any-return]

    def sequence_parallel(self) -> SequenceParallel:
        """Image tokens are divided in their own layers, and those of image and text in the layers that follow.

        The layers for the text alone, a few hundred tokens, run on every rank.
        """
        transformer = self.pipeline.transformer
        tokens = {_TOKENS: ContextParallelInput(split_dim=1, expected_dims=3)}
        positions = {"freqs_cis": ContextParallelInput(split_dim=1, expected_dims=3)}
        gathered = ContextParallelOutput(gather_dim=1, expected_dims=3)
        plan = {
            "noise_refiner.0": tokens,
            "noise_refiner.*": positions,
            f"noise_refiner.{len(transformer.noise_refiner) - 1}": gathered,
            "layers.0": tokens,
            "layers.*": positions,
            "all_final_layer.2-1": gathered,
        }
        return SequenceParallel(
            transformer, plan, lambda attention: () if attention.startswith("context_refiner.") else (_TOKENS,)
        )
