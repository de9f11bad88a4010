"""Real models on CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tetriserve.core.execution import Execution
from tetriserve.core.request import Request
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, ENCODE_IMAGE
from tetriserve.launch import BUNDLED_MODEL
from tetriserve.models.card import ModelCard
from tetriserve.models.checkpoint import read_card
from tetriserve.profile import Profile, Row, save_profile

if TYPE_CHECKING:
    from tetriserve.models.flux.adapter import FluxAdapter

# Worker processes begin with a copy of this path: it is how they find the adapters that tests inject.
sys.path.append(str(Path(__file__).parent / "injected"))

STEP_S = {256: {1: 0.1, 2: 0.06, 4: 0.04}, 512: {1: 0.3, 2: 0.17, 4: 0.1}}
DECODE_S = {256: 0.05, 512: 0.2}

Paint = Callable[[Request], np.ndarray]
"""A request's pixels as one process computes them alone at degree 1."""


@pytest.fixture(autouse=True)
def same_attention_afterwards() -> Iterator[None]:
    """diffusers sets an attention backend for the process, not for the model alone."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    backend = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(backend)


@pytest.fixture(scope="session")
def bundled_dir() -> Path:
    return BUNDLED_MODEL


@pytest.fixture(scope="session")
def bundled_card(bundled_dir: Path) -> ModelCard:
    return read_card(bundled_dir)


@pytest.fixture(scope="session")
def profile(bundled_card: ModelCard) -> Profile:
    return Profile(
        model=bundled_card.name,
        fingerprint=bundled_card.fingerprint,
        hardware="written by hand",
        execution=Execution("float32"),
        source="tests",
        created="2026-01-01",
        switch_s=0.002,
        rows=(
            Row(stage=ENCODE, seconds=0.01),
            *(
                Row(stage=DENOISE, height=side, width=side, tokens=side * side // 1024, degree=degree, seconds=step_s)
                for side, times in STEP_S.items()
                for degree, step_s in times.items()
            ),
            *(
                Row(stage=stage, height=side, width=side, seconds=seconds)
                for stage in (ENCODE_IMAGE, DECODE)
                for side, seconds in DECODE_S.items()
            ),
        ),
    )


@pytest.fixture(scope="session")
def profile_path(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("profiles") / "profile.json"
    save_profile(profile, path)
    return str(path)


@pytest.fixture(scope="session")
def reference(bundled_card: ModelCard) -> FluxAdapter:
    """The adapter in this process, at degree 1."""
    import torch

    from tetriserve.models.flux.adapter import FluxAdapter

    torch.set_num_threads(1)
    return FluxAdapter(bundled_card, "cpu")


@pytest.fixture(scope="session")
def paint(reference: FluxAdapter) -> Paint:
    def paint(request: Request) -> np.ndarray:
        loop = reference.denoise_loop(request, reference.encode(request), 0)
        latents = reference.initial_latents(request)
        for _ in range(request.num_steps):
            latents = loop.step(latents)
        return reference.decode(request, latents)

    return paint
