"""What a server's processes hold over time: memory, threads, open files, and process groups in the tensor store."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.processes import Process, find_processes, store_directory

WARM_UP = 0.25
"""Share of a run after which nothing may grow any more."""


@dataclass(frozen=True, slots=True)
class Sample:
    """`values` by what they are: megabytes of each role's own memory, counts.

    Pages that several processes share count once. Libraries are left out: other servers on the machine map them too,
    and with every one of them that comes or goes our share of them would change.
    """

    time_s: float
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Course:
    """How one value went after the warm-up: medians of the first and the last quarter of what followed."""

    name: str
    first: float
    last: float
    highest: float

    @property
    def growth(self) -> float:
        return (self.last - self.first) / self.first if self.first else float(self.last > 0)


def take_sample(session: int) -> Sample:
    values: defaultdict[str, float] = defaultdict(float)
    for process in find_processes(session):
        role = _role(process, session)
        try:
            values[f"{role} memory MB"] += _memory_mb(process.pid)
            values[f"{role} threads"] += sum(1 for _ in Path(f"/proc/{process.pid}/task").iterdir())
            values[f"{role} fds"] += sum(1 for _ in Path(f"/proc/{process.pid}/fd").iterdir())
        except OSError:
            continue  # it has just ended
    directory = store_directory(session)
    if directory is not None:
        names = [path.name for path in directory.iterdir()]
        values["group files"] = sum(name.startswith("team-") for name in names)
    return Sample(time.time(), dict(values))


def files_left(session: int) -> list[str]:
    """What the store holds of requests; nothing, if all have ended."""
    directory = store_directory(session)
    names = [] if directory is None else [path.name for path in directory.iterdir()]
    return [name for name in names if name.endswith((".safetensors", ".tmp")) and not name.startswith(".preview-basis")]


def courses(samples: Sequence[Sample]) -> list[Course]:
    """Of every value of the server and its workers."""
    warm = samples[int(len(samples) * WARM_UP) :]
    if len(warm) < 8:
        return []
    quarter = len(warm) // 4
    names = sorted({name for sample in warm for name in sample.values})
    found = []
    for name in names:
        values = [sample.values.get(name, 0.0) for sample in warm]
        first, last = statistics.median(values[:quarter]), statistics.median(values[-quarter:])
        found.append(Course(name, first, last, max(values)))
    return found


def _role(process: Process, session: int) -> str:
    if process.pid == session:
        return "server"
    return "workers" if process.rank is not None else "fork server"


def _memory_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024
