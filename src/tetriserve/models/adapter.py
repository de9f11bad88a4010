"""What a model family provides: each stage of a request as a call, parallelism applied from outside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from tetriserve.core.events import TextCount
from tetriserve.core.request import Request

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch.distributed.device_mesh import DeviceMesh

Embeds = Mapping[str, "torch.Tensor"]
"""What encode leaves behind, by name; moves between ranks as it is."""


class DenoiseLoop(Protocol):
    """One request's denoise loop, standing before step `steps_done`."""

    def step(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents after one more step; the argument is left as it was. Every rank of the mesh gets the whole."""
        ...

    @property
    def noise_level(self) -> float:
        """The share of noise in the latents as they stand: 1 before the first step, 0 after the last."""
        ...


class Adapter(Protocol):
    """One loaded checkpoint on one rank. Degree 1 is bit-identical to calling the diffusers pipeline."""

    def encode(self, request: Request) -> Embeds: ...

    def count_text(self, request: Request) -> TextCount:
        """How much of the prompt `encode` reads; quick, and nothing of the prompt is logged."""
        ...

    def initial_latents(self, request: Request) -> torch.Tensor:
        """The request's noise, from its own seed alone: the same on every rank."""
        ...

    def denoise_loop(self, request: Request, embeds: Embeds, steps_done: int) -> DenoiseLoop: ...

    def use_mesh(self, mesh: DeviceMesh | None) -> None:
        """Split the sequence over `mesh` (one dimension) from the next step on; None is degree 1, the bare model."""
        ...

    def decode(self, request: Request, latents: torch.Tensor) -> np.ndarray:
        """Pixels, uint8, (height, width, 3)."""
        ...

    def latents_of(self, pixels: np.ndarray) -> torch.Tensor:
        """The latents that decode to `pixels`, as nearly as the model can; (1, tokens, channels)."""
        ...
