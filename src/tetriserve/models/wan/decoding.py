"""Wan's VAE both ways. A video is decoded latent frame by latent frame, as the VAE itself does it, and handed on at
once: all its pixels are never in memory together. What is cut into tiles is decoded by `models.tiled_decode`.

Suffixes of tensor names: see `models.wan.adapter`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify


def spread(vae: Any, latents_BCTHW: torch.Tensor) -> torch.Tensor:
    """Latents as the VAE decodes them, of those that steps are made of."""
    latents_BCTHW = latents_BCTHW.to(vae.dtype)
    mean, inverse = _statistics(vae, latents_BCTHW)
    return latents_BCTHW / inverse + mean


def decode_by_frame(vae: Any, latents_BCTHW: torch.Tensor) -> Iterator[torch.Tensor]:
    """The video of latents, `spread`, a latent frame at a time: (1, 3, N, H, W) from -1 to 1, N is 1 and then 4."""
    # As `AutoencoderKLWan._decode`: each latent frame goes through the decoder with what those before it have left.
    vae.clear_cache()
    try:
        inner_BCTHW = vae.post_quant_conv(latents_BCTHW)
        for index in range(inner_BCTHW.shape[2]):
            vae._conv_idx = [0]
            frame_BCTHW = inner_BCTHW[:, :, index : index + 1]
            options = {"first_chunk": True} if index == 0 else {}
            video_BCNHW = vae.decoder(frame_BCTHW, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **options)
            if vae.config.patch_size is not None:
                video_BCNHW = unpatchify(video_BCNHW, patch_size=vae.config.patch_size)
            yield torch.clamp(video_BCNHW, min=-1.0, max=1.0)
    finally:
        vae.clear_cache()


def most_likely_latents(vae: Any, video_BCNHW: torch.Tensor) -> torch.Tensor:
    """The most likely latents of a video from -1 to 1, in float32."""
    latents_BCTHW = vae.encode(video_BCNHW.to(vae.dtype)).latent_dist.mode().to(torch.float32)
    mean, inverse = _statistics(vae, latents_BCTHW)
    return (latents_BCTHW - mean) * inverse  # type: ignore[no-any-return]


def _statistics(vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean, and inverse of the standard deviation, of latents by channel: (1, C, 1, 1, 1), as `latents` are."""
    mean, deviation = (
        torch.tensor(each).view(1, -1, 1, 1, 1).to(latents.device, latents.dtype)
        for each in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, 1.0 / deviation
