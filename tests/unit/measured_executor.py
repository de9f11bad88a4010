"""An executor whose tasks take what a test says, without processes and without a clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tests.states import MemoryStates, bundle_of
from tetriserve.core.events import StartTask, TaskFinished
from tetriserve.core.plan import Task
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, ENCODE, ENCODE_IMAGE
from tetriserve.executor.protocol import Executor, OnEvent

PIXEL = bundle_of(pixels=np.zeros((1, 1, 3), np.uint8))
STEP_S = {1: 0.4, 2: 0.25}
DECODE_S = 0.3
ENCODE_S = 0.02
ENCODE_IMAGE_S = 0.15

Took = Callable[[Shape, Task, int], tuple[float, float | None]]
"""Seconds and processor seconds of a task of a shape, by how many decodes of the shape ended before it."""


def batch_factor(batch: int) -> float:
    """Of the time of a single step: batches up to 4 cost half of each more member, larger ones all of it."""
    return 1 + 0.5 * (min(batch, 4) - 1) + max(0, batch - 4)


def quiet_s(task: Task) -> float:
    if task.num_steps:
        return task.num_steps * STEP_S[task.degree] * batch_factor(task.batch)
    return {ENCODE: ENCODE_S, ENCODE_IMAGE: ENCODE_IMAGE_S, DECODE: DECODE_S}[task.stage]


class MeasuredExecutor(Executor):
    """Runs every task at once, if the stages before its own have left something.

    `goes` counts, per shape, how often it was measured: a go ends with six decodes.
    """

    def __init__(self, took: Took, num_ranks: int = 2) -> None:
        self._took = took
        self._num_ranks = num_ranks
        self._num_decodes: dict[Shape, int] = {}
        self._states = MemoryStates()
        self._on_event: OnEvent = lambda event: None

    @property
    def ranks(self) -> frozenset[int]:
        return frozenset(range(self._num_ranks))

    @property
    def states(self) -> MemoryStates:
        return self._states

    @property
    def goes(self) -> dict[Shape, int]:
        return {shape: self._go(shape) for shape in self._num_decodes}

    def subscribe(self, on_event: OnEvent) -> None:
        self._on_event = on_event

    def start_task(self, command: StartTask) -> None:
        task, shape = command.task, command.work[0].request.shape
        for work in command.work:
            assert work.states.keys() >= {stage.kind for stage in work.request.stages[: work.stage_index]}
        elapsed_s, cpu_s = self._took(shape, task, self._go(shape))
        if task.stage == DECODE:
            self._num_decodes[shape] = self._num_decodes.get(shape, 0) + 1
        left = self._states.put(f"{command.task_id}", PIXEL if task.stage == DECODE else b"")
        ended = replace(TaskFinished.planned(command, elapsed_s, left), cpu_s=cpu_s)
        asyncio.get_running_loop().call_soon(lambda: self._on_event(ended))

    def forget(self, request_id: str) -> None: ...

    def _go(self, shape: Shape) -> int:
        return self._num_decodes.get(shape, 0) // (6 * self._num_ranks)
