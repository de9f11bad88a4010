"""Pictures compressed once, to be learnt from many times: shards of latents with the seeds of their scenes.

Shards may be added while `dit` trains; it takes up new ones as they come.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL

from training.layouts import PIXELS_PER_TOKEN
from training.learner import load, save
from training.model import LATENT_CHANNELS, pack
from training.pictures import labels_of, pictures_of, prefetched, spots_of
from training.vae import encode, to_images

_SHARD_SIZE = 256


@torch.no_grad()
def store_latents(
    folder: Path, vae: AutoencoderKL, height: int, width: int, *, num_pictures: int, num_workers: int
) -> None:
    """Add shards of this size under `folder` until it holds `num_pictures`; `num_workers` processes draw."""
    batch = max(1, 2**19 // (height * width))
    paths = [folder / f"{height}x{width}" / f"{first:08d}.pt" for first in range(0, num_pictures, _SHARD_SIZE)]
    paths = [path for path in paths if not path.exists()]
    calls = (
        (seeds[start : start + batch], height, width)
        for seeds in map(_shard_seeds, paths)
        for start in range(0, _SHARD_SIZE, batch)
    )
    pictures = prefetched(pictures_of, calls, num_workers)
    for path in paths:
        latents_BSC: list[torch.Tensor] = []
        while sum(map(len, latents_BSC)) < _SHARD_SIZE:
            images_BCHW = to_images(next(pictures), vae.device)
            with torch.autocast(vae.device.type, torch.bfloat16):  # close enough, and sooner done
                latents_BSC.append(pack(encode(vae, images_BCHW)))
        seeds = torch.tensor(_shard_seeds(path))
        save(path, {"seeds": seeds, "latents": torch.cat(latents_BSC).half().cpu()})
        print(f"latents {path.parent.name}: {int(path.stem) + _SHARD_SIZE} of {num_pictures}", flush=True)


def _shard_seeds(path: Path) -> range:
    """A seed belongs to one size only: sizes do not repeat each other's scenes."""
    height, width = map(int, path.parent.name.split("x"))
    first = (height * 10_000 + width) * 10**8 + int(path.stem)
    return range(first, first + _SHARD_SIZE)


class LatentBank:
    """All shards of one size, in memory: (N, S, 4C) float16 with N seeds."""

    def __init__(self, folder: Path, height: int, width: int) -> None:
        self._size = height, width
        self.height, self.width = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
        self._folder = folder / f"{height}x{width}"
        self._names: set[str] = set()
        self._seeds = torch.empty(0, dtype=torch.int64)
        self._latents = torch.empty(0, self.height * self.width, 4 * LATENT_CHANNELS, dtype=torch.float16)
        self.refresh()

    def __len__(self) -> int:
        return len(self._seeds)

    def refresh(self) -> None:
        """Take up shards written since."""
        paths = sorted(path for path in self._folder.glob("*.pt") if path.name not in self._names)
        if not paths:
            return
        shards = [load(path, torch.device("cpu")) for path in paths]
        self._names.update(path.name for path in paths)
        self._seeds = torch.cat([self._seeds, *(shard["seeds"] for shard in shards)])
        self._latents = torch.cat([self._latents, *(shard["latents"] for shard in shards)])

    def labels(self, seeds: list[int]) -> torch.Tensor:
        """What each token of the pictures is part of (len(seeds), S, 5); see `Label`."""
        return torch.from_numpy(np.stack([labels_of(seed, *self._size) for seed in seeds]))

    def spots(self, seed: int) -> np.ndarray:
        return spots_of(seed, *self._size)

    def draw(self, random: Random, count: int) -> tuple[list[int], torch.Tensor]:
        """`count` random seeds and their latents (count, S, 4C), float32."""
        rows = torch.tensor([random.randrange(len(self)) for _ in range(count)])
        return self._seeds[rows].tolist(), self._latents[rows].float()
