"""FLUX with faults to order: marks in a request's prompt say what goes wrong with it.

Workers import this module by name (`adapter="faulty_flux:FaultyFlux"`); the conftest puts its directory on the path.
In a team it is the last member alone that misbehaves, so that the others are left waiting.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import torch

from tetriserve.core.request import Request
from tetriserve.models.adapter import Tensors
from tetriserve.models.card import ModelCard
from tetriserve.models.diffusion import DenoiseLoop
from tetriserve.models.flux.adapter import FluxAdapter
from tetriserve.models.team import Team

FAIL_MEMORY, FAIL_RUNTIME, NAN, KILL, SLOW = "[memory]", "[runtime]", "[nan]", "[kill]", "[slow]"
SLOW_STAGE_S, SLOW_STEP_S = 0.4, 0.05


class FaultyFlux(FluxAdapter):
    """Computes what `FluxAdapter` does, unless a mark says otherwise; `[slow]` changes no number."""

    is_last_member = True

    def use_team(self, team: Team | None) -> None:
        self.is_last_member = team is None or team.index == team.degree - 1
        super().use_team(team)

    def encode(self, request: Request, images: Tensors | None = None) -> Tensors:
        if SLOW in request.prompt:
            time.sleep(SLOW_STAGE_S)
        return super().encode(request, images)

    def denoise_loop(self, request: Request, embeds: Tensors, steps_done: int, *left: Tensors) -> Any:
        return FaultyLoop(self, request, super().denoise_loop(request, embeds, steps_done, *left))

    def decode(self, request: Request, latents: torch.Tensor) -> np.ndarray:
        if SLOW in request.prompt:
            time.sleep(SLOW_STAGE_S)
        return super().decode(request, latents)


class FaultyLoop:
    """A loop whose timestep, the first that a step asks for, comes late or not at all."""

    def __init__(self, adapter: FaultyFlux, request: Request, loop: DenoiseLoop) -> None:
        self._adapter = adapter
        self._prompt = request.prompt
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    @property
    def timestep(self) -> torch.Tensor:
        if SLOW in self._prompt:
            time.sleep(SLOW_STEP_S)
        if self._adapter.is_last_member:
            if FAIL_MEMORY in self._prompt:
                raise MemoryError("no room for another tensor")
            if FAIL_RUNTIME in self._prompt:
                raise RuntimeError("expected 3 dimensions, got 4")
            if KILL in self._prompt:
                os.kill(os.getpid(), signal.SIGKILL)
        return self._loop.timestep

    def advance(self, latents: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        after = self._loop.advance(latents, prediction)
        if NAN in self._prompt and self._adapter.is_last_member:
            after = after.clone()
            after[0, 0, 0] = torch.nan
        return after


class Unloadable:
    """A model that fails to load with an error that nobody foresaw."""

    error: Exception = RuntimeError("weights of another planet")

    def __init__(self, card: ModelCard, device: torch.device | str) -> None:
        raise self.error


class Unreadable(Unloadable):
    error = PermissionError(13, "Permission denied", "/models/weights")
