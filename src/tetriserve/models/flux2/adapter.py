"""FLUX.2 dev and klein: the own parts of their pipelines in diffusers, driven one step at a time.

Suffixes of tensor names: see `models.diffusion`; R is the tokens of pictures to refer to.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input, retrieve_timesteps
from PIL import Image

from tetriserve.core.events import TextCount
from tetriserve.core.request import Request, Shape
from tetriserve.models.adapter import Tensors
from tetriserve.models.diffusion import Branch, DenoiseLoop, DiffusionAdapter, num_text_tokens
from tetriserve.models.flux2.facts import DEV, condition_shapes


@dataclass(frozen=True)
class _Inputs:
    """Positions of the latents, with those of pictures after them, and of the text; the tokens of pictures."""

    img_ids_BSA: torch.Tensor
    txt_ids_BLA: torch.Tensor
    pictures_BRC: torch.Tensor | None
    guidance_B: torch.Tensor | None


class Flux2Adapter(DiffusionAdapter):
    """Latents are packed and normalised: (B, S, 4C)."""

    num_template_tokens = 128
    """Dev's are a system prompt."""

    def encode_prompt(self, prompt: str, length: int) -> dict[str, torch.Tensor]:
        prompt_embeds_BLD, _ = self.pipeline.encode_prompt(prompt, device=self.device, max_sequence_length=length)
        return {"prompt_embeds": prompt_embeds_BLD}

    def text_parts(self, embeds: Tensors) -> Mapping[str, torch.Tensor]:
        return {"text_encoder": embeds["prompt_embeds"]}

    def count_text(self, request: Request) -> TextCount:
        """With the chat template, and dev's system prompt, which stand around the prompt."""
        tokenizer = self.pipeline.tokenizer
        if self._is_dev:
            [messages] = format_input([request.prompt], self.pipeline.system_message)
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            num_tokens = len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        else:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": request.prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            num_tokens = num_text_tokens(tokenizer, text)
        return TextCount(num_tokens, num_tokens > (request.max_sequence_length or self.card.num_text_tokens))

    def noise(self, request: Request, generator: torch.Generator) -> torch.Tensor:
        shape, num_channels = request.shape, self.pipeline.transformer.config.in_channels // 4
        latents_BSC, _ = self.pipeline.prepare_latents(
            1, num_channels, shape.height, shape.width, self.dtype, self.device, generator
        )
        return latents_BSC  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode_images(self, request: Request, images: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tokens of pictures that the steps refer to: `pictures` (1, R, 4C), and their `picture_ids` (1, R, A)."""
        pictures_BCHW = [
            self._prepared(Image.fromarray(image.cpu().numpy()), shape)
            for image, shape in zip(images, condition_shapes(self.card, request.images), strict=True)
        ]
        pictures_BRC, picture_ids_BRA = self.pipeline.prepare_image_latents(
            pictures_BCHW, 1, self.generator(request), self.device, self.pipeline.vae.dtype
        )
        return {"pictures": pictures_BRC, "picture_ids": picture_ids_BRA}

    def set_timesteps(self, scheduler: Any, request: Request) -> torch.Tensor:
        num_steps, (rows, columns) = request.num_schedule_steps, self._tokens_along(request.shape)
        sigmas_N = None if scheduler.config.get("use_flow_sigmas") else np.linspace(1.0, 1 / num_steps, num_steps)
        shift = compute_empirical_mu(rows * columns, num_steps)
        timesteps_N, _ = retrieve_timesteps(scheduler, num_steps, self.device, sigmas=sigmas_N, mu=shift)
        return timesteps_N  # type: ignore[no-any-return]

    def inputs(self, request: Request, encoded: Tensors) -> _Inputs:
        pipeline, pictures_BRC = self.pipeline, encoded.get("pictures")
        img_ids_BSA = pipeline._prepare_latent_ids(torch.empty(1, 0, *self._tokens_along(request.shape)))
        img_ids_BSA = img_ids_BSA.to(self.device)
        if pictures_BRC is not None:
            img_ids_BSA = torch.cat([img_ids_BSA, encoded["picture_ids"]], dim=1)
        txt_ids_BLA = pipeline._prepare_text_ids(encoded["prompt_embeds"]).to(self.device)
        guidance_B = None
        if self._is_dev:
            guidance_B = torch.full([1], request.guidance_scale, device=self.device, dtype=torch.float32)
        return _Inputs(img_ids_BSA, txt_ids_BLA, pictures_BRC, guidance_B)

    def kind(self, branch: Branch) -> Hashable:
        """With pictures of the same sizes: the model is given the positions of one member for all."""
        return branch.latents.shape, branch.embeds().shape, branch.loop.request.images

    def forward(self, branches: Sequence[Branch]) -> Sequence[torch.Tensor]:
        transformer = self.pipeline.transformer
        latents_BSC = torch.cat([branch.latents for branch in branches])
        inputs: list[_Inputs] = [branch.loop.inputs for branch in branches]
        pictures = [each.pictures_BRC for each in inputs if each.pictures_BRC is not None]
        guidances = [each.guidance_B for each in inputs if each.guidance_B is not None]
        timesteps_B = torch.stack([branch.loop.timestep for branch in branches])
        if pictures:
            tokens_BSC = torch.cat([latents_BSC, torch.cat(pictures)], dim=1)
        else:  # the pipeline's are transposed in memory: products with an adapter's narrow matrices depend on it
            tokens_BSC = latents_BSC.mT.contiguous().mT
        velocity_BSC = transformer(
            hidden_states=tokens_BSC.to(transformer.dtype),
            timestep=timesteps_B.to(latents_BSC.dtype) / 1000,
            guidance=torch.cat(guidances) if guidances else None,
            encoder_hidden_states=torch.cat([branch.embeds() for branch in branches]),
            txt_ids=inputs[0].txt_ids_BLA,
            img_ids=inputs[0].img_ids_BSA,
            return_dict=False,
        )[0]
        return velocity_BSC[:, : latents_BSC.shape[1]].split(1)  # type: ignore[no-any-return]

    def guide(self, loop: DenoiseLoop, prediction: torch.Tensor, negative: torch.Tensor | None) -> torch.Tensor:
        if negative is None:
            return prediction
        return negative + loop.request.guidance_scale * (prediction - negative)

    def unpacked(self, latents_BSC: torch.Tensor, shape: Shape) -> torch.Tensor:
        """As the VAE takes them: (B, C, H, W)."""
        bn = self.pipeline.vae.bn
        std_C = torch.sqrt(bn.running_var + self.pipeline.vae.config.batch_norm_eps).to(latents_BSC.dtype)
        mean_C = bn.running_mean.to(latents_BSC.dtype)
        latents_BCHW = latents_BSC.mT.reshape(len(latents_BSC), -1, *self._tokens_along(shape)).contiguous()
        latents_BCHW = latents_BCHW * std_C[:, None, None] + mean_C[:, None, None]
        return self.pipeline._unpatchify_latents(latents_BCHW)  # type: ignore[no-any-return]

    def decode_latents(self, latents: torch.Tensor, shape: Shape) -> torch.Tensor | None:
        return self.pipeline.vae.decode(self.unpacked(latents, shape), return_dict=False)[0]  # type: ignore[no-any-return]

    def encode_pixels(self, image_BCHW: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        latents_BCHW = self.pipeline._encode_vae_image(image_BCHW, generator)  # draws nothing from the generator
        return self.pipeline._pack_latents(latents_BCHW)  # type: ignore[no-any-return]

    @property
    def _is_dev(self) -> bool:
        return self.card.pipeline_class == DEV

    def _tokens_along(self, shape: Shape) -> tuple[int, int]:
        side = self.card.pixels_per_token
        return shape.height // side, shape.width // side

    def _prepared(self, picture: Image.Image, shape: Shape) -> torch.Tensor:
        """(1, 3, H, W) from -1 to 1: shrunk to nearly `shape` where it is larger, then cropped to it."""
        processor = self.pipeline.image_processor
        picture = processor._resize_if_exceeds_area(picture)
        return processor.preprocess(picture, height=shape.height, width=shape.width, resize_mode="crop")  # type: ignore[no-any-return]
