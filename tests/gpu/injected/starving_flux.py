"""FLUX that runs out of memory once, in the way of the device's own allocator: a mark in a request's prompt says when.

`[starve FILE]`: the first process that makes FILE cannot allocate from then on; later ones, finding it, can.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from tetriserve.core.request import Request
from tetriserve.models.adapter import Tensors
from tetriserve.models.diffusion import DenoiseLoop
from tetriserve.models.flux.adapter import FluxAdapter

_MARK = re.compile(r"\[starve (.+)\]")


class StarvingFlux(FluxAdapter):
    def denoise_loop(self, request: Request, embeds: Tensors, steps_done: int, *left: Tensors) -> DenoiseLoop:
        if mark := _MARK.search(request.prompt):
            try:
                Path(mark[1]).touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                self._starve()
        return super().denoise_loop(request, embeds, steps_done, *left)

    def _starve(self) -> torch.Tensor:
        """Ask the allocator for more than it may have, which on a GPU is next to nothing from here on."""
        if self.device.type == "cpu":
            return torch.empty(2**60, dtype=torch.uint8)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e-6)
        return torch.empty(2**26, dtype=torch.uint8, device=self.device)
