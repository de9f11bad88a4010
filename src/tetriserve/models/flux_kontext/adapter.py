"""FLUX.1 Kontext: FLUX.1 with the tokens of a picture behind those of the latents (`diffusers.FluxKontextPipeline`).

Suffixes of tensor names: see `models.diffusion`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image

from tetriserve.core.request import Request
from tetriserve.models.adapter import Tensors
from tetriserve.models.diffusion import Branch
from tetriserve.models.flux.adapter import FluxAdapter, Inputs
from tetriserve.models.flux_kontext.facts import condition_shapes


class FluxKontextAdapter(FluxAdapter):
    """Steps without a picture are those of FLUX.1."""

    def noise(self, request: Request, generator: torch.Generator) -> torch.Tensor:
        shape, num_channels = request.shape, self.pipeline.transformer.config.in_channels // 4
        latents_BSC, *_ = self.pipeline.prepare_latents(
            None, 1, num_channels, shape.height, shape.width, self.dtype, self.device, generator
        )
        return latents_BSC  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode_images(self, request: Request, images: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """`image_latents` (B, S, 4C), without noise."""
        [image], [shape] = images, condition_shapes(self.card, request.images)
        processor = self.pipeline.image_processor
        picture = processor.resize(Image.fromarray(image.cpu().numpy()), shape.height, shape.width)
        image_BCHW = processor.preprocess(picture, shape.height, shape.width).to(self.device, self.dtype)
        return {"image_latents": self.encode_pixels(image_BCHW)}

    def inputs(self, request: Request, encoded: Tensors) -> Inputs:
        inputs = super().inputs(request, encoded)
        if "image_latents" not in encoded:
            return inputs
        [shape] = condition_shapes(self.card, request.images)
        image_ids_SA = self._image_ids(shape)
        image_ids_SA[:, 0] = 1
        return replace(inputs, img_ids_SA=torch.cat([inputs.img_ids_SA, image_ids_SA]))

    def forward(self, branches: Sequence[Branch]) -> Sequence[torch.Tensor]:
        """The pictures' tokens take part, and what the transformer says of them is left out."""
        with_images = [
            replace(branch, latents=torch.cat([branch.latents, *self._image_latents(branch)], dim=1))
            for branch in branches
        ]
        num_tokens = branches[0].latents.shape[1]
        return [velocity_BSC[:, :num_tokens] for velocity_BSC in super().forward(with_images)]

    def _image_latents(self, branch: Branch) -> list[torch.Tensor]:
        image_latents = branch.loop.encoded.get("image_latents")
        return [] if image_latents is None else [image_latents]
