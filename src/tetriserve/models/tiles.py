"""How VAEs cut what they decode into tiles: facts of their configuration, without torch; see `tiled_decode`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetriserve.core.request import Shape
from tetriserve.models.files import read_json

_VIDEO_TILE, _VIDEO_STRIDE = 256, 192
"""Pixels along each side, as the constructors of diffusers' VAEs of Qwen-Image and Wan have them."""
_MOST = 2**20


@dataclass(frozen=True, slots=True)
class Tiles:
    """Squares of `side` latents, one every `stride` of them along height and width: neighbours overlap.

    scale: pixels along each side of a latent.
    """

    side: int
    stride: int
    scale: int

    def count(self, shape: Shape) -> int:
        """Tiles of each frame of `shape`; 1 for one that is not larger than a tile, which is decoded whole."""
        height, width = shape.height // self.scale, shape.width // self.scale
        if max(height, width) <= self.side:
            return 1
        return -(-height // self.stride) * -(-width // self.stride)


def read_tiles(path: Path) -> Tiles | None:
    """Of the checkpoint's VAE; None for one of which no more than the whole picture can be decoded at once here."""
    file = path / "vae/config.json"
    vae = read_json(file) if file.is_file() else {}
    make = {
        "AutoencoderKL": _of_pictures,
        "AutoencoderKLFlux2": _of_pictures,
        "AutoencoderKLQwenImage": _of_videos,
        "AutoencoderKLWan": _of_videos,
    }.get(str(vae.get("_class_name")))
    return None if make is None else make(vae)


def _of_pictures(vae: Mapping[str, Any]) -> Tiles | None:
    """`AutoencoderKL` and that of FLUX.2: tiles are as large as the pictures that it was trained with."""
    default = 1024 if vae["_class_name"] == "AutoencoderKLFlux2" else 32
    sample_size, blocks = vae.get("sample_size", default), vae.get("block_out_channels", ())
    if not (_is_count(sample_size) and isinstance(blocks, list) and blocks):
        return None
    scale = 1 << (len(blocks) - 1)
    side = sample_size // scale
    stride = int(side * 0.75)
    return Tiles(side, stride, scale) if stride and sample_size % scale == 0 else None


def _of_videos(vae: Mapping[str, Any]) -> Tiles | None:
    """Those of Qwen-Image and of Wan."""
    scale = vae.get("scale_factor_spatial", 8)
    if vae["_class_name"] == "AutoencoderKLQwenImage":
        halvings = vae.get("temperal_downsample", [False, True, True])
        scale = 1 << len(halvings) if isinstance(halvings, list) else None
    if not _is_count(scale) or _VIDEO_TILE % scale or _VIDEO_STRIDE % scale:
        return None
    return Tiles(_VIDEO_TILE // scale, _VIDEO_STRIDE // scale, scale)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST
