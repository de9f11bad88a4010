"""Was a measurement disturbed by other work? What the workers got of the processor, and how far repeats lie apart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tetriserve.config import PoolConfig
from tetriserve.core.events import TaskFinished

MIN_SHARE = 0.85
"""Of the processor time that workers get on a quiet machine. With less, times are more than 18 % too long."""
MAX_SPREAD = 0.3
"""Between the quartiles, over the median. With more, the median of five is uncertain by more than about 12 %."""


def disturbance(samples: Sequence[TaskFinished], *, is_local: bool, fair_share: float) -> str:
    """What speaks against `samples`, equal tasks that were measured; empty if nothing does.

    is_local: the tasks waited for no other rank, so that their thread ran all the time if it could.
    fair_share: of the processor, for each worker when nothing else runs. Below 1 the ranks disturb each other, as they
        do when they serve; then repeats differ and that says nothing.
    """
    elapsed_s = sum(sample.elapsed_s for sample in samples)
    cpu_s = [sample.cpu_s for sample in samples if sample.cpu_s is not None]
    if is_local and len(cpu_s) == len(samples):
        share = sum(cpu_s) / elapsed_s
        if share < MIN_SHARE * fair_share:
            return f"workers had a processor for {share:.0%} of the time"
    spread = _spread([sample.elapsed_s for sample in samples])
    if fair_share == 1 and spread > MAX_SPREAD:
        return f"repeats lie {spread:.0%} apart"
    return ""


def fair_share(pool: PoolConfig) -> float:
    """What each worker thread gets of a processor when all ranks work and nothing else does."""
    if pool.device != "cpu":
        return 1.0
    return min(1.0, num_cores() / (pool.num_ranks * pool.num_threads))


def num_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Processors that this process may use: those of its affinity, or fewer where a container has a quota."""
    cores = float(len(os.sched_getaffinity(0)))
    quota = _words(cgroup / "cpu.max")  # version 2: "150000 100000", or "max 100000"
    if not quota:
        quota = [*_words(cgroup / "cpu/cpu.cfs_quota_us"), *_words(cgroup / "cpu/cpu.cfs_period_us")]  # version 1
    if len(quota) == 2 and all(word.isdecimal() and int(word) > 0 for word in quota):
        cores = min(cores, int(quota[0]) / int(quota[1]))
    return cores


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _spread(values: Sequence[float]) -> float:
    """Distance of the quartiles over the median: a single hiccup does not move it."""
    ordered, count = sorted(values), len(values)
    return (ordered[3 * count // 4] - ordered[count // 4]) / ordered[count // 2]
