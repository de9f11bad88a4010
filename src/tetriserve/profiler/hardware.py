"""What this machine is, as far as times depend on it; asked of the system and the driver, never of CUDA."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from tetriserve.config import PoolConfig


def hardware_name(pool: PoolConfig) -> str:
    """What a profile is valid for: the processor or GPU, how many ranks share it, and how they exchange tensors."""
    over = "" if pool.collectives == pool.usual_collectives else f", {pool.collectives} collectives"
    if pool.device == "cuda":
        shared = f", {pool.ranks_per_gpu} ranks each" if pool.ranks_per_gpu > 1 else ""
        return f"{pool.num_gpus} x {next(iter(visible_gpus()), 'unknown GPU')}{shared}{over}"
    threads = f" of {pool.num_threads} threads" if pool.num_threads > 1 else ""
    return f"{len(os.sched_getaffinity(0))} cores of {_cpu_name()}, {pool.num_ranks} ranks{threads}{over}"


def visible_gpus() -> list[str]:
    """Names of the GPUs that CUDA programs started from here may use, in their order (`cuda:0` first).

    By the driver's own tool, and by CUDA_VISIBLE_DEVICES as CUDA reads it: indices or ids, up to the first that is
    none. Empty without a GPU.
    """
    command = ["nvidia-smi", "--query-gpu=uuid,name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return _visible(listed, os.environ.get("CUDA_VISIBLE_DEVICES"))


def gpu_bytes() -> list[int]:
    """Memory of each GPU that `visible_gpus` lists; empty where the driver does not say."""
    command = ["nvidia-smi", "--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    sizes = _visible(listed, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return [int(size) * 2**20 for size in sizes] if all(size.isdecimal() for size in sizes) else []


def host_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _visible(listed: str, wanted: str | None) -> list[str]:
    """`listed`: a line of id and name, or another fact, for each GPU of the machine, in the order of the bus."""
    gpus = [tuple(map(str.strip, line.split(",", 1))) for line in listed.splitlines() if "," in line]
    if wanted is None:
        return [name for _, name in gpus]
    visible: list[str] = []
    for word in map(str.strip, wanted.split(",")):
        if word.isdecimal() and int(word) < len(gpus):
            visible.append(gpus[int(word)][1])
        elif word and len(found := [name for uuid, name in gpus if uuid.startswith(word)]) == 1:
            visible.append(found[0])
        else:
            break
    return visible


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
