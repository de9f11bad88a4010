"""A rank that keeps nothing between tasks: what it lacks comes from the store, and no picture changes by a bit."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from tetriserve.core.events import StartTask, TensorRef, Work
from tetriserve.core.messages import RunTask, TaskDone
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, image_stages
from tetriserve.models.flux.adapter import FluxAdapter
from tetriserve.worker.bundle import arrays_of
from tetriserve.worker.runner import Runner
from tetriserve.worker.store import TensorStore
from tetriserve.worker.team.shm import ShmTeam

PROMPTS = {"a": "a red circle", "b": "a blue square on sand"}


class CountingStore(TensorStore):
    """Remembers what was loaded."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.loaded: list[str] = []

    def load(self, ref: TensorRef, device: str) -> dict[str, torch.Tensor]:
        self.loaded.append(ref.key)
        return super().load(ref, device)


class Rank:
    """One rank that runs tasks of single requests, each where the one before ended."""

    def __init__(self, adapter: FluxAdapter, directory: Path, resident_bytes: int) -> None:
        self.store = CountingStore(directory)
        no_team = cast(ShmTeam, None)
        self._runner = Runner({"": adapter}, no_team, self.store, 0, "cpu", resident_bytes)
        self.works = {name: Work(make_request(name), 0, 0, {}) for name in PROMPTS}
        self._num_tasks = 0

    def run(self, name: str, stage: str, num_steps: int = 0) -> None:
        work, self._num_tasks = self.works[name], self._num_tasks + 1
        start = StartTask(self._num_tasks, Task((name,), stage, (0,), num_steps), (work,))
        done = self._runner.run(RunTask(start, self._num_tasks))
        assert isinstance(done, TaskDone), done
        (result,) = done.results
        after = work.trajectory.after(result.num_steps, is_stage_over=result.is_stage_over)
        states = {**work.states, stage: result.left}
        self.works[name] = Work(work.request, after.stage_index, after.stage_steps_done, states)


def make_request(name: str) -> Request:
    return Request(
        request_id=name, prompt=PROMPTS[name], shape=Shape(128, 128), stages=image_stages(4), seed=3, arrival_s=0.0,
        deadline_s=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("resident_bytes", [0, 2**30])
def test_requests_that_push_each_other_out_get_the_same_pictures_to_the_bit(
    reference: FluxAdapter, tmp_path: Path, resident_bytes: int
) -> None:
    rank = Rank(reference, tmp_path, resident_bytes)
    for stage, num_steps in ((ENCODE, 0), (DENOISE, 2), (DENOISE, 2), (DECODE, 0)):
        for name in PROMPTS:
            rank.run(name, stage, num_steps)

    for name in PROMPTS:
        request = make_request(name)
        loop = reference.denoise_loop(request, reference.encode(request), 0)
        latents = reference.initial_latents(request)
        for _ in range(request.num_steps):
            latents = loop.step(latents)
        states = rank.works[name].states
        assert torch.equal(rank.store.load(states[DENOISE], "cpu")["latents"], latents)
        assert np.array_equal(arrays_of(rank.store.get(states[DECODE]))["pixels"], reference.decode(request, latents))
        del rank.store.loaded[-1]
    stages = [key.split(".")[1] for key in rank.store.loaded if key.startswith("a.")]
    assert stages == ([ENCODE, ENCODE, DENOISE, ENCODE, DENOISE] if resident_bytes == 0 else [])


def test_one_request_alone_stays_whatever_it_takes(reference: FluxAdapter, tmp_path: Path) -> None:
    rank = Rank(reference, tmp_path, resident_bytes=0)
    for stage, num_steps in ((ENCODE, 0), (DENOISE, 1), (DENOISE, 3), (DECODE, 0)):
        rank.run("a", stage, num_steps)
    assert rank.store.loaded == []
