"""Real models on one GPU. Each test runs on the CPU too, so that all but CUDA itself is known to work where none is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tetriserve.launch import BUNDLED_MODEL
from tetriserve.models.card import ModelCard
from tetriserve.models.checkpoint import read_card

if TYPE_CHECKING:
    from tetriserve.models.flux.adapter import FluxAdapter

# Worker processes begin with a copy of this path: it is how they find the adapters that tests inject.
sys.path.append(str(Path(__file__).parent / "injected"))

NO_GPU = "no CUDA device; see docs/gpu.md"


@pytest.fixture(
    scope="session",
    params=[
        "cpu",
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)]),
    ],
)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def card() -> ModelCard:
    return read_card(BUNDLED_MODEL)


@pytest.fixture(scope="session")
def reference(card: ModelCard, device: str) -> Iterator[FluxAdapter]:
    """The adapter in this process, at degree 1."""
    from tetriserve.models.flux.adapter import FluxAdapter

    torch.set_num_threads(1)
    yield FluxAdapter(card, device)
