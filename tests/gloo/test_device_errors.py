"""What a rank does when its GPU is short of memory or broken, on a CPU: errors are injected, the rest is real."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tetriserve.core.events import FailureKind, StartTask, Work
from tetriserve.core.messages import RunTask, TaskDone, TaskError
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import ENCODE, image_stages
from tetriserve.models.adapter import Left, Member
from tetriserve.models.team import Team
from tetriserve.worker.runner import DeviceLost, Runner
from tetriserve.worker.store import TensorStore
from tetriserve.worker.team import Region
from tetriserve.worker.team.shm import ShmTeam

REQUEST = Request(
    request_id="a", prompt="a", shape=Shape(64, 64), stages=image_stages(4), seed=0, arrival_s=0.0, deadline_s=0.0
)
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


class Failing:
    """An adapter whose first tasks end with `errors`, one after the other."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = [*errors]
        self.num_runs = 0

    def use_team(self, team: Team | None) -> None:
        pass

    def run(self, stage: str, members: Sequence[Member], num_steps: int, on_step: Any, **_: Any) -> list[Left]:
        self.num_runs += 1
        if self.errors:
            raise self.errors.pop(0)
        return [Left({"embeds": torch.ones(3)}) for _ in members]


@pytest.fixture
def region() -> Region:
    return Region(2)


def runner_of(adapter: Failing, region: Region, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    runner = Runner({"": adapter}, ShmTeam(region, 0), TensorStore(directory), 0, "cpu", 2**20)  # type: ignore[arg-type]
    runner._is_on_gpu = True
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return runner


def order(ranks: tuple[int, ...], task_id: int = 1) -> RunTask:
    return RunTask(StartTask(task_id, Task(("a",), ENCODE, ranks), (Work(REQUEST, 0, 0, {}),)), task_id)


def test_a_task_that_found_no_memory_is_run_again_when_what_can_be_freed_is_freed(
    region: Region, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = Failing()
    runner = runner_of(adapter, region, tmp_path, monkeypatch)
    assert isinstance(runner.run(order((0,))), TaskDone)
    assert "a" in runner._residents
    adapter.errors = [OUT_OF_MEMORY]
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("a" in runner._residents))
    assert isinstance(runner.run(order((0,), 2)), TaskDone)
    assert (adapter.num_runs, emptied) == (3, [False])


@pytest.mark.parametrize(("ranks", "num_runs"), [((0,), 2), ((0, 1), 1)])
def test_a_task_that_finds_none_again_is_left_to_other_ranks_and_the_worker_lives(
    region: Region, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: tuple[int, ...], num_runs: int
) -> None:
    adapter = Failing(OUT_OF_MEMORY, OUT_OF_MEMORY)
    runner = runner_of(adapter, region, tmp_path, monkeypatch)
    answer = runner.run(order(ranks))
    assert isinstance(answer, TaskError)
    assert (answer.kind, adapter.num_runs) == (FailureKind.LOST, num_runs)
    assert answer.message.startswith("encode failed: OutOfMemoryError: CUDA out of memory")
    adapter.errors.clear()
    assert isinstance(runner.run(order((0,), 2)), TaskDone)


def test_a_library_that_words_it_otherwise_is_understood(
    region: Region, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(runner_of(Failing(CUBLAS), region, tmp_path, monkeypatch).run(order((0,))), TaskDone)


def test_peers_are_freed_before_the_rank_answers_or_finds_its_device_lost(
    region: Region, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of(Failing(RuntimeError("CUDA error: an illegal memory access")), region, tmp_path, monkeypatch)
    freed: list[int] = []

    def broken() -> None:
        freed.append(region.words[region.aborted(1)])
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(DeviceLost, match="^encode failed: RuntimeError: .*; CUDA error: an illegal .* encountered$"):
        runner.run(order((0, 1), 5))
    assert freed == [5]


def test_a_failed_step_on_a_sound_device_is_the_requests_own(
    region: Region, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = runner_of(Failing(ValueError("no")), region, tmp_path, monkeypatch).run(order((0,)))
    assert isinstance(answer, TaskError)
    assert answer.kind is FailureKind.STEP
