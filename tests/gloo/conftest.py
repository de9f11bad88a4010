"""Real models on CPU. The environment must be set before torch is first imported, here and in child processes."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tetriserve.core.request import Request
from tetriserve.models import bundled
from tetriserve.models.card import ModelCard, read_card

if TYPE_CHECKING:
    from tetriserve.models.flux import FluxAdapter

# Worker processes begin with a copy of this path: it is how they find the adapters that tests inject.
sys.path.append(str(Path(__file__).parent / "injected"))

Paint = Callable[[Request], np.ndarray]
"""A request's pixels as one process computes them alone at degree 1."""


@pytest.fixture(scope="session")
def bundled_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, built once per session."""
    return bundled.ensure(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def bundled_card(bundled_dir: Path) -> ModelCard:
    return read_card(bundled_dir)


@pytest.fixture(scope="session")
def reference(bundled_card: ModelCard) -> FluxAdapter:
    """The adapter in this process, at degree 1."""
    import torch

    from tetriserve.models.flux import FluxAdapter

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
