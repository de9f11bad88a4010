"""Which GPUs workers may use, and what a profile's hardware is called."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tetriserve.config import PoolConfig
from tetriserve.core.errors import ConfigError
from tetriserve.launch import StartProgress, measure_profile
from tetriserve.profiler.hardware import hardware_name, visible_gpus

LISTED = "GPU-aa1, NVIDIA H200\nGPU-aa2, NVIDIA H200 NVL\nGPU-bb1, NVIDIA A100, 80 GB\n"


@pytest.fixture
def three_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver's tool that lists three GPUs."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{LISTED}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (None, ["NVIDIA H200", "NVIDIA H200 NVL", "NVIDIA A100, 80 GB"]),
        ("2,0", ["NVIDIA A100, 80 GB", "NVIDIA H200"]),
        (" 1 , 2 ", ["NVIDIA H200 NVL", "NVIDIA A100, 80 GB"]),
        ("GPU-bb", ["NVIDIA A100, 80 GB"]),
        ("GPU-aa", []),  # of two
        ("0,7,1", ["NVIDIA H200"]),  # nothing after the first that is none
        ("-1", []),
        ("", []),
    ],
)
def test_gpus_are_those_that_cuda_would_see(
    three_gpus: None, monkeypatch: pytest.MonkeyPatch, wanted: str | None, names: list[str]
) -> None:
    if wanted is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", wanted)
    assert visible_gpus() == names


def test_hardware_is_named_by_what_times_depend_on(three_gpus: None) -> None:
    gpus = PoolConfig(num_ranks=2, device="cuda")
    assert hardware_name(gpus) == "2 x NVIDIA H200"
    assert (
        hardware_name(PoolConfig(num_ranks=2, device="cuda", collectives="shm")) == "2 x NVIDIA H200, shm collectives"
    )
    shared = PoolConfig(num_ranks=4, device="cuda", ranks_per_gpu=2)
    assert hardware_name(shared) == "2 x NVIDIA H200, 2 ranks each"
    cores = hardware_name(PoolConfig(num_ranks=2))
    assert cores.endswith(", 2 ranks")
    assert hardware_name(PoolConfig(num_ranks=2, collectives="torch")) == f"{cores}, torch collectives"


@pytest.mark.parametrize(
    ("pool", "visible", "message"),
    [
        (PoolConfig(num_ranks=4, device="cuda"), None, "ranks is 4, but there are 3 GPUs; use --ranks 3"),
        (
            PoolConfig(num_ranks=8, device="cuda", ranks_per_gpu=2),
            "0,1",
            "ranks is 8, but there are 2 GPUs for 2 ranks each; use --ranks 4",
        ),
        (PoolConfig(num_ranks=1, device="cuda"), "9", "no GPU on this machine among CUDA_VISIBLE_DEVICES='9'"),
    ],
)
def test_more_ranks_than_gpus_are_refused(
    three_gpus: None, monkeypatch: pytest.MonkeyPatch, pool: PoolConfig, visible: str | None, message: str
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError) as caught:
        asyncio.run(measure_profile(None, pool, (), StartProgress()))
    assert message in str(caught.value)


def test_ranks_of_a_gpu_are_neighbours() -> None:
    pool = PoolConfig(num_ranks=5, device="cuda", ranks_per_gpu=2)
    assert [pool.device_of(rank) for rank in range(5)] == ["cuda:0", "cuda:0", "cuda:1", "cuda:1", "cuda:2"]
    assert (pool.num_gpus, pool.backend, pool.collectives) == (3, "gloo", "shm")
    own = PoolConfig(num_ranks=2, device="cuda")
    assert (own.num_gpus, own.backend, own.collectives) == (2, "nccl", "torch")
    assert (PoolConfig().num_gpus, PoolConfig().backend, PoolConfig().collectives) == (0, "gloo", "shm")
