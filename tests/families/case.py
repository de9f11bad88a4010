"""What the suite of all families must know of one: how to build a tiny checkpoint, and how to call its pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tetriserve.core.request import MP4, Request
from tetriserve.launch import BUNDLED_MODEL

Call = Callable[[Any, Request, int], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class FamilyCase:
    """
    build: write a tiny random checkpoint into a folder, laid out as the published ones are; components of the real
        classes.
    call: keyword arguments of the pipeline's own call, of a request and its text length, but for those that
        `call_pipeline` gives to all.
    guided: fields of a request whose steps have two passes; None for a family that has one pass only.
    degrees: those that its heads allow, of 1 to 4.
    """

    name: str
    build: Callable[[Path], None]
    call: Call
    guided: Mapping[str, Any] | None
    degrees: tuple[int, ...] = (1, 2, 4)
    as_latents: Callable[[Any, Request, torch.Tensor], torch.Tensor] = lambda adapter, request, latents: latents
    """Of the last step's latents what the pipeline returns as `output_type="latent"`."""
    absent: tuple[str, ...] = ()
    """Components that the checkpoint leaves out; diffusers insists on being told."""
    given: Callable[[Path], Mapping[str, Any]] = lambda path: {}
    """Components that the pipeline cannot load by itself here, of a checkpoint."""
    num_text_tokens: int = 64
    """Fewer than the model's own: long texts take time."""
    pictures: tuple[tuple[int, int], ...] = ()
    """Height and width of pictures that the pipeline's own call takes as `image`, and whose tokens take part in steps:
    the most that it takes."""
    picture_pipeline: str | None = None
    """The pipeline class that takes them, of the same components; None is that of the checkpoint."""
    in_float32: tuple[str, ...] = ()
    """Components that do not take the other models' dtype."""
    image_to_image: str | None = None
    """The pipeline class that starts from a picture, of the same components."""
    resizes: bool = True
    """Whether that pipeline takes pictures of other sizes than the request's."""
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """More requests to try, as fields, by name."""


def call_pipeline(
    case: FamilyCase, pipeline: Any, request: Request, length: int, output_type: str, **options: Any
) -> Any:
    """What the pipeline itself makes of a request: latents (1, ...), or a picture, or a video's frames (N, H, W, 3)."""
    output = pipeline(
        **case.call(pipeline, request, length),
        num_inference_steps=request.num_schedule_steps,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type=output_type,
        **options,
    )
    if request.media_type == MP4:
        return output.frames if output_type == "latent" else np.stack(output.frames[0])
    return output.images if output_type == "latent" else output.images[0]


def bundled_tokenizer(name: str) -> Any:
    """`tokenizer` is CLIP's, `tokenizer_2` T5's."""
    from transformers import AutoTokenizer, CLIPTokenizer

    kind: Any = CLIPTokenizer if name == "tokenizer" else AutoTokenizer
    return kind.from_pretrained(BUNDLED_MODEL / name)


def randomised(module: Any, scale: float = 0.3) -> Any:
    """The model in evaluation mode, all of its parameters random: zero-initialised outputs would hide faults."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(noise / max(fan_in, 1) ** 0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(scale * 0.1 * noise)
    return module.eval()


def tiny_vae(latent_channels: int = 4, **options: Any) -> Any:
    """An `AutoencoderKL` with 8 pixels along each side of a latent."""
    from diffusers import AutoencoderKL

    return randomised(
        AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=1.5,
            shift_factor=0.06,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **options,
        )
    )
