"""Qwen-Image-Edit(-Plus): Qwen-Image whose text encoder reads pictures and whose steps see them.

By `diffusers.QwenImageEditPlusPipeline`'s own parts, or `QwenImageEditPipeline`'s. Suffixes of tensor names: see
`models.diffusion`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from PIL import Image

from tetriserve.core.request import Request, Shape
from tetriserve.models.adapter import Tensors
from tetriserve.models.diffusion import Branch
from tetriserve.models.qwen_image.adapter import QwenImageAdapter
from tetriserve.models.qwen_image_edit.facts import PLUS, READ_PIXELS, STEP_PIXELS, condition_shapes, resized
from tetriserve.models.qwen_image_edit.processor import load_processor

_BLACK = Image.new("RGB", (56, 56))
_NUM_PLACE_TOKENS = 3
"""Its start, its place and its end."""


class QwenImageEditAdapter(QwenImageAdapter):
    """Steps without a picture are those of Qwen-Image."""

    def components(self) -> dict[str, Any]:
        """Without torchvision transformers cannot load the processor, for its part for videos."""
        if find_spec("torchvision") is not None:
            return {}
        return {"processor": load_processor(self.card.path / "processor")}

    def encode_prompt(self, prompt: str, length: int) -> dict[str, torch.Tensor]:
        return self.encode_beside(prompt, length, [])

    def encode_beside(self, prompt: str, length: int, images: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The pipeline cuts no texts: what is beyond `length` is left out of the embeddings, as in Qwen-Image."""
        is_plus = self.card.pipeline_class == PLUS
        read = [self._resized(image, READ_PIXELS if is_plus else STEP_PIXELS) for image in images]
        if not read and not is_plus:
            read = [_BLACK]  # the template has the place of one
        prompt_embeds_BLD, _ = self.pipeline.encode_prompt(prompt, read or None, self.device)
        num_cut = max(0, self.num_text_tokens(prompt) - length)
        return {"prompt_embeds": prompt_embeds_BLD[:, : prompt_embeds_BLD.shape[1] - num_cut]}

    def num_text_tokens(self, prompt: str) -> int:
        """Without those of pictures."""
        num_places: int = self.pipeline.prompt_template_encode.count("<|image_pad|>")
        return super().num_text_tokens(prompt) - num_places * _NUM_PLACE_TOKENS

    def noise(self, request: Request, generator: torch.Generator) -> torch.Tensor:
        shape, num_channels = request.shape, self.pipeline.transformer.config.in_channels // 4
        latents_BSC, _ = self.pipeline.prepare_latents(
            None, 1, num_channels, shape.height, shape.width, self.dtype, self.device, generator
        )
        return latents_BSC  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode_images(self, request: Request, images: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """`image_latents` (B, S, 4C) of all pictures, without noise."""
        latents = [self._image_latents(*each) for each in zip(images, self._conditions(request), strict=True)]
        return {"image_latents": torch.cat(latents, dim=1)}

    def inputs(self, request: Request, encoded: Tensors) -> list[tuple[int, int, int]]:
        inputs, side = super().inputs(request, encoded), self.card.pixels_per_token
        conditions = self._conditions(request) if "image_latents" in encoded else ()
        return [*inputs, *((1, each.height // side, each.width // side) for each in conditions)]

    def forward(self, branches: Sequence[Branch]) -> Sequence[torch.Tensor]:
        """The pictures' tokens take part, and what the transformer says of them is left out."""
        with_images = [replace(each, latents=torch.cat(_sequence(each), dim=1)) for each in branches]
        num_tokens = branches[0].latents.shape[1]
        return [velocity_BSC[:, :num_tokens] for velocity_BSC in super().forward(with_images)]

    def _conditions(self, request: Request) -> Sequence[Shape]:
        return condition_shapes(self.card, request.images)

    def _resized(self, image_HWC: torch.Tensor, num_pixels: int) -> Image.Image:
        """As the text encoder reads it."""
        shape = resized(Shape(*image_HWC.shape[:2]), num_pixels)
        picture = Image.fromarray(image_HWC.cpu().numpy())
        return self.pipeline.image_processor.resize(picture, shape.height, shape.width)  # type: ignore[no-any-return]

    def _image_latents(self, image_HWC: torch.Tensor, shape: Shape) -> torch.Tensor:
        picture = Image.fromarray(image_HWC.cpu().numpy())
        image_BCHW = self.pipeline.image_processor.preprocess(picture, shape.height, shape.width)
        image_BCTHW = image_BCHW.unsqueeze(2).to(self.device, self.dtype)
        return self.packed(self.pipeline._encode_vae_image(image_BCTHW, None))


def _sequence(branch: Branch) -> list[torch.Tensor]:
    """Tokens of the output, then of the pictures; each (B, S, 4C)."""
    image_latents = branch.loop.encoded.get("image_latents")
    return [branch.latents] if image_latents is None else [branch.latents, image_latents]
