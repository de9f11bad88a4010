"""The autoencoder: 16 pixels to a latent pixel on each side, learnt from drawings.

Suffixes of tensor names: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from training.learner import Learner, Schedule, load
from training.pictures import crops_of, pictures_of, prefetched

_WEIGHTS = {"pixels": 1.0, "edges": 1.0, "divergence": 1e-3}
_LATENT_NOISE = 0.15
"""The decoder alone is trained on latents up to this far off (in deviations), as a denoiser may leave them."""


def make_vae() -> AutoencoderKL:
    """Five blocks, narrow where the image is large: 0.05 s to decode 256x256 on one core."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(8, 16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        # Several groups would each lose their level, which is all that a flat colour is.
        norm_num_groups=1,
        sample_size=256,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    _initialise(vae)
    return vae.to(memory_format=torch.channels_last)


def train_vae(
    path: Path, schedule: Schedule, *, num_pixels: int, decoder_only: bool, num_workers: int, device: torch.device
) -> None:
    """Train into the checkpoint `path`, continuing it if it exists.

    num_pixels: of all pictures in a batch together.
    decoder_only: leave the encoder as it is, so that latents stored with it stay valid.
    num_workers: processes that draw; 0 draws in this one.
    """
    torch.manual_seed(0)
    vae = make_vae().to(device)
    learner = vae_learner(path, vae)
    if decoder_only:
        # Stored latents are the averaged encoder's: the decoder learns from it, and the average stays what it is.
        vae.encoder.load_state_dict(learner.average.encoder.state_dict())
    torch.manual_seed(learner.num_steps)
    batches = prefetched(crops_of, ((seed, num_pixels) for seed in count(learner.num_steps)), num_workers)

    def loss_terms() -> dict[str, Tensor]:
        losses = _losses(vae, to_images(next(batches), device), decoder_only)
        return {name: _WEIGHTS[name] * loss for name, loss in losses.items()}

    def measure() -> dict[str, float]:
        return learner.facts if decoder_only else _measure_latents(learner.average, device)

    learner.train(schedule, loss_terms, measure)


def vae_learner(path: Path, vae: AutoencoderKL) -> Learner[AutoencoderKL]:
    blocks = [*vae.encoder.down_blocks, vae.encoder.mid_block, vae.decoder.mid_block, *vae.decoder.up_blocks]
    return Learner(path, vae, blocks, horizon=200)


def load_vae(path: Path, device: torch.device) -> AutoencoderKL:
    """The averaged weights of checkpoint `path`, with the measured shift and scale of its latents in the config."""
    checkpoint = load(path, device)
    vae = make_vae().to(device).eval().requires_grad_(False)
    vae.load_state_dict(checkpoint["average"])
    vae.register_to_config(**checkpoint["facts"])
    return vae


def encode(vae: AutoencoderKL, images_BCHW: Tensor) -> Tensor:
    """Latents of mean 0 and variance 1 over all drawings, as a pipeline's denoiser sees them."""
    mean_BCHW = vae.encode(images_BCHW).latent_dist.mean
    latents_BCHW: Tensor = (mean_BCHW - vae.config.shift_factor) * vae.config.scaling_factor
    return latents_BCHW


def to_images(pixels_BHWC: np.ndarray, device: torch.device) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] of uint8 pixels."""
    images_BHWC = torch.from_numpy(pixels_BHWC).to(device).float().div(127.5).sub(1.0)
    return images_BHWC.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _losses(vae: AutoencoderKL, images_BCHW: Tensor, decoder_only: bool) -> dict[str, Tensor]:
    """Absolute error of the pixels and, to keep edges sharp, of their differences to the neighbours; divergence."""
    with torch.set_grad_enabled(not decoder_only):
        posterior = vae.encode(images_BCHW).latent_dist
    if decoder_only:
        strength = _LATENT_NOISE * posterior.mean.std() * torch.rand(len(images_BCHW), 1, 1, 1, device=vae.device)
        latents_BCHW = posterior.mean + strength * torch.randn_like(posterior.mean)
    else:
        latents_BCHW = posterior.sample()
    error_BCHW = vae.decode(latents_BCHW).sample - images_BCHW
    losses = {
        "pixels": error_BCHW.abs().mean(),
        "edges": error_BCHW.diff(dim=2).abs().mean() + error_BCHW.diff(dim=3).abs().mean(),
    }
    if not decoder_only:
        losses["divergence"] = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
    return losses


@torch.no_grad()
def _measure_latents(vae: AutoencoderKL, device: torch.device, num_pictures: int = 32) -> dict[str, float]:
    """The shift and scale that `encode` needs."""
    images_BCHW = to_images(pictures_of(range(num_pictures), 256, 256), device)
    means = torch.cat([vae.encode(images_BCHW[i : i + 1]).latent_dist.mean for i in range(num_pictures)])
    return {"shift_factor": means.mean().item(), "scaling_factor": 1.0 / means.std().item()}


def _initialise(vae: AutoencoderKL) -> None:
    """Signals keep their size, blocks start near the identity, and latents start with little noise."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.data.mul_(0.1)
    log_variance = slice(vae.config.latent_channels, None)
    vae.encoder.conv_out.weight.data[log_variance].mul_(0.1)
    vae.encoder.conv_out.bias.data[log_variance] = -6.0
