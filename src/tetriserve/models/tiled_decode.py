"""Decode in tiles, shared by the ranks of a team, with the bits of the VAE's own `tiled_decode`.

Members decode whole tiles, each as the VAE does; the leader gets them all and joins them by the VAE's own `blend_v` and
`blend_h`, in its order. The tiles depend on the configuration and the size alone, hence so do the pixels.

Rows of tiles are decoded in bands. A picture is one band. A video has several: then a member holds the tiles of one
band at a time, and the features of one tile. (Frame by frame over all tiles, each tile would keep the features that its
next frame takes: 591 MB for 256x256 pixels of Wan 2.1 in float32, 14 GB for all tiles of 1280x720.)

Suffixes of tensor names: B batch, C channels, T frames (of videos alone), H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from diffusers.models.autoencoders.vae import DecoderOutput

from tetriserve.models.team import Team

BAND_BYTES = 2**29
"""Of decoded tiles, at most, unless one row has more."""
_PICTURES, _VIDEOS = (AutoencoderKL, AutoencoderKLFlux2), (AutoencoderKLQwenImage, AutoencoderKLWan)


class _Box(NamedTuple):
    """A tile, in latents."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """How a VAE cuts latents and joins samples, along height and width. Samples of some VAEs are patches of pixels.

    sides, strides: of tiles, in latents.
    blends: samples over which a tile turns into its neighbour.
    kept: samples of each tile that remain.
    scale: samples along each side of a latent; frame_scale: frames of each latent frame but the first, which is one.
    channels: of samples.
    """

    sides: tuple[int, int]
    strides: tuple[int, int]
    blends: tuple[int, int]
    kept: tuple[int, int]
    scale: int
    channels: int
    frame_scale: int = 1

    def rows(self, height: int, width: int) -> list[list[_Box]]:
        """The tiles of so many latents, from top to bottom and from left to right."""
        return [
            [
                _Box(top, left, min(self.sides[0], height - top), min(self.sides[1], width - left))
                for left in range(0, width, self.strides[1])
            ]
            for top in range(0, height, self.strides[0])
        ]

    def samples(self, latents: torch.Tensor, box: _Box) -> torch.Size:
        """The shape of what a tile of `latents` is decoded to."""
        frames = [1 + (num_frames - 1) * self.frame_scale for num_frames in latents.shape[2:-2]]
        return torch.Size((len(latents), self.channels, *frames, box.height * self.scale, box.width * self.scale))


def _cut_of(vae: Any) -> _Cut:
    """As the VAE is set now."""
    config = vae.config
    if isinstance(vae, _PICTURES):
        side, sample = vae.tile_latent_min_size, vae.tile_sample_min_size
        blend = int(sample * vae.tile_overlap_factor)
        return _Cut(
            sides=(side, side),
            strides=(int(side * (1 - vae.tile_overlap_factor)),) * 2,
            blends=(blend, blend),
            kept=(sample - blend,) * 2,
            scale=2 ** (len(config.block_out_channels) - 1),
            channels=config.out_channels,
        )
    ratio, patch = vae.spatial_compression_ratio, config.get("patch_size") or 1
    sides = vae.tile_sample_min_height, vae.tile_sample_min_width
    strides = vae.tile_sample_stride_height, vae.tile_sample_stride_width
    kept = strides[0] // patch, strides[1] // patch
    return _Cut(
        sides=(sides[0] // ratio, sides[1] // ratio),
        strides=(strides[0] // ratio, strides[1] // ratio),
        blends=(sides[0] // patch - kept[0], sides[1] // patch - kept[1]),
        kept=kept,
        scale=ratio // patch,
        channels=config.out_channels if isinstance(vae, AutoencoderKLWan) else config.input_channels,
        frame_scale=2 ** sum(vae.temperal_downsample),
    )


class TiledDecode:
    """Takes the place of `vae.tiled_decode` while there is a team; without one that is diffusers'.

    on_part: called after each part of a tile; it may raise, which ends the decode.
    """

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._team: Team | None = None
        self.on_part: Callable[[], None] = lambda: None
        if isinstance(vae, (*_PICTURES, *_VIDEOS)):
            self._alone = vae.tiled_decode
            vae.tiled_decode = self._tiled_decode

    def use(self, team: Team | None) -> None:
        """From the next decode on."""
        self._team = team

    def cuts(self, latents: torch.Tensor) -> bool:
        """Whether the VAE decodes latents of this size in tiles."""
        sides = zip(latents.shape[-2:], _cut_of(self._vae).sides, strict=True)
        return bool(self._vae.use_tiling) and any(side > most for side, most in sides)

    def strips(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """What the decoder makes of `latents` (B, C, [T,] H, W), before `finished`: from top to bottom, each strip over
        the whole width. Only the leader gets any; the other members make the same call to do their part.

        Raises:
            PeerLost: a member is lost.
        """
        cut = _cut_of(self._vae)
        height, width = (side * cut.scale for side in latents.shape[-2:])
        above: list[torch.Tensor] = []
        row: list[torch.Tensor] = []
        for band in self._bands(latents, cut):
            row = []  # of the last band, while the next is decoded
            tiles = self._decode(latents, cut, [box for boxes in band for box in boxes])
            while tiles:
                row, tiles = tiles[: len(band[0])], tiles[len(band[0]) :]
                strip = self._join(above, row, cut)[..., :height, :width]
                height -= strip.shape[-2]
                yield strip
                above = [tile[..., max(0, tile.shape[-2] - cut.blends[0]) :, :].clone() for tile in row]

    def _tiled_decode(self, z: torch.Tensor, return_dict: bool = True) -> Any:
        """As the VAE's own; the sample is None where another rank leads."""
        if self._team is None:
            return self._alone(z, return_dict=return_dict)
        strips = list(self.strips(z))
        sample = finished(self._vae, torch.cat(strips, dim=-2)) if strips else None
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _join(self, above: Sequence[torch.Tensor], row: Sequence[torch.Tensor], cut: _Cut) -> torch.Tensor:
        """A row of tiles, blended in place with the end of the row above, if there is one, and with each other."""
        parts = []
        for index, tile in enumerate(row):
            if above:
                tile = self._vae.blend_v(above[index], tile, cut.blends[0])
            if index:
                tile = self._vae.blend_h(row[index - 1], tile, cut.blends[1])
            parts.append(tile[..., : cut.kept[0], : cut.kept[1]])
        return torch.cat(parts, dim=-1)

    def _bands(self, latents: torch.Tensor, cut: _Cut) -> list[list[list[_Box]]]:
        """The rows of tiles, those together that are decoded before any of them is joined."""
        bands: list[list[list[_Box]]] = []
        room = 0
        for row in cut.rows(*latents.shape[-2:]):
            num_bytes = sum(math.prod(cut.samples(latents, box)) for box in row) * latents.element_size()
            if num_bytes > room:
                bands.append([])
                room = BAND_BYTES
            bands[-1].append(row)
            room -= num_bytes
        return bands

    def _decode(self, latents: torch.Tensor, cut: _Cut, boxes: Sequence[_Box]) -> list[torch.Tensor]:
        """All tiles, in their order, on the leader; on other members none."""
        degree, index = (1, 0) if self._team is None else (self._team.degree, self._team.index)
        shares = dealt([box.height * box.width for box in boxes], degree)
        tiles = {number: self._decode_tile(latents, cut, boxes[number]) for number in shares[index]}
        if self._team is not None:
            shapes = [cut.samples(latents, box) for box in boxes]
            gather(self._team, tiles, shares, shapes, latents.new_empty(1, 0))
        return [tiles[number] for number in range(len(boxes))] if index == 0 else []

    def _decode_tile(self, latents: torch.Tensor, cut: _Cut, box: _Box) -> torch.Tensor:
        vae, (top, left, height, width) = self._vae, box
        part = latents[..., top : top + height, left : left + width]
        if isinstance(vae, _PICTURES):
            tile: torch.Tensor = vae.decoder(vae.post_quant_conv(part) if vae.config.use_post_quant_conv else part)
            self.on_part()
        else:
            tile = self._decode_frames(part)
        assert tile.shape == cut.samples(latents, box) and tile.dtype == latents.dtype
        return tile

    def _decode_frames(self, latents_BCTHW: torch.Tensor) -> torch.Tensor:
        """One after the other, each with the features that those before it left."""
        vae, frames = self._vae, []
        vae.clear_cache()
        try:
            for number, frame_BCTHW in enumerate(torch.split(latents_BCTHW, 1, dim=2)):
                vae._conv_idx = [0]
                options = {"first_chunk": number == 0} if isinstance(vae, AutoencoderKLWan) else {}
                frame_BCTHW = vae.post_quant_conv(frame_BCTHW)
                frames.append(vae.decoder(frame_BCTHW, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **options))
                self.on_part()
        finally:
            vae.clear_cache()
        return torch.cat(frames, dim=2)


def finished(vae: Any, samples: torch.Tensor) -> torch.Tensor:
    """What `vae.decode` returns, of all samples or of a strip of them."""
    if not isinstance(vae, AutoencoderKLWan):
        return samples
    if vae.config.patch_size is not None:
        samples = unpatchify(samples, patch_size=vae.config.patch_size)
    return torch.clamp(samples, min=-1.0, max=1.0)


def dealt(sizes: Sequence[int], degree: int) -> list[list[int]]:
    """Which tiles each of `degree` members decodes: the largest first, each to the member with the least so far.

    >>> dealt([4, 4, 2, 4, 4, 2], 2)
    [[0, 3, 2], [1, 4, 5]]
    """
    shares: list[list[int]] = [[] for _ in range(degree)]
    loads = [0] * degree
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        member = loads.index(min(loads))
        shares[member].append(number)
        loads[member] += sizes[number]
    return shares


def gather(
    team: Team,
    tiles: dict[int, torch.Tensor],
    shares: Sequence[Sequence[int]],
    shapes: Sequence[torch.Size],
    nothing: torch.Tensor,
) -> None:
    """Move all tiles to the leader.

    Args:
        tiles: those that this member has decoded, by number; on return all of them on the leader, and none elsewhere.
        shares: the numbers of each member's tiles.
        shapes: of all tiles.
        nothing: (1, 0), of their dtype and device.
    """
    for turn in range(max(map(len, shares[1:]), default=0)):
        sends, receives, most = [nothing] * team.degree, [nothing] * team.degree, 0
        for member, share in enumerate(shares):
            if member == 0 or turn >= len(share):
                continue
            number = share[turn]
            most = max(most, math.prod(shapes[number]))
            if team.index == 0:
                tiles[number] = nothing.new_empty(shapes[number])
                receives[member] = tiles[number].view(1, -1)
            elif team.index == member:
                sends[0] = tiles.pop(number).reshape(1, -1)
        team.exchange(sends, receives, most * nothing.element_size())
