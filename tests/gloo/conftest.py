"""Real models on CPU. The environment must be set before torch is first imported, here and in child processes."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from pathlib import Path

import pytest

from tetriserve.models import bundled


@pytest.fixture(scope="session")
def bundled_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, built once per session."""
    return bundled.ensure(tmp_path_factory.mktemp("models"))
