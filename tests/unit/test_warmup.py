"""Warming: what an engine runs before it is ready, and that a failure names what was run."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from tests.unit.measured_executor import MeasuredExecutor, quiet_s
from tetriserve.config import PoolConfig
from tetriserve.core.errors import TetriServeError
from tetriserve.core.events import FailureKind, StartTask, TaskFailed
from tetriserve.core.execution import Execution
from tetriserve.core.plan import Task
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.models.card import ModelCard
from tetriserve.profile import Profile, ProfileCost, Row
from tetriserve.profiler import warm_up

SMALL, LARGE = Shape(256, 256), Shape(512, 512)
CARD = ModelCard(
    name="tiny", path=Path("tiny"), family="flux", pipeline_class="FluxPipeline",
    execution=Execution("float32"), size_multiple=32,
    pixels_per_token=32, num_heads=8, num_text_tokens=64, default_num_steps=20, default_guidance_scale=3.5,
    has_guidance=True, has_negative_prompt=True, sizes=(SMALL, LARGE), fingerprint="abc",
)  # fmt: skip
COMPILED = dataclasses.replace(CARD, execution=Execution("float32", compile="regional"))
POOL = PoolConfig(num_ranks=4)
BATCH_S = {1: 0.1, 2: 0.15, 4: 0.2, 8: 0.8}
COST = ProfileCost(
    Profile(
        model="tiny", fingerprint="abc", hardware="h", execution=COMPILED.execution, source="s", created="c",
        switch_s=0.001, max_batch=8,
        rows=(
            Row(stage=ENCODE, seconds=0.1),
            *(
                Row(stage=DENOISE, height=shape.height, width=shape.width, tokens=64, degree=degree, seconds=0.1)
                for shape in CARD.sizes
                for degree in (1, 2, 4)
            ),
            *(
                Row(stage=DENOISE, height=256, width=256, tokens=64, degree=1, batch=batch, seconds=seconds)
                for batch, seconds in BATCH_S.items()
                if batch > 1
            ),
            *(Row(stage=DECODE, height=shape.height, width=shape.width, seconds=0.1) for shape in CARD.sizes),
        ),
    ),
    lambda shape: (1, 2) if shape == LARGE else (1, 2, 4),
    batch_limit=8,
)  # fmt: skip
"""The large size cannot run at degree 4. At the small one, batches of up to 4 save time for each member."""


async def warmed(card: ModelCard) -> tuple[list[tuple[Shape, str, tuple[int, ...], int]], list[tuple[int, int, str]]]:
    """The tasks, and what was said of the progress."""
    tasks: list[tuple[Shape, str, tuple[int, ...], int]] = []
    told: list[tuple[int, int, str]] = []

    def took(shape: Shape, task: Task, go: int) -> tuple[float, float | None]:
        tasks.append((shape, task.stage, task.ranks, task.batch))
        return quiet_s(Task(task.members, task.stage, (0,), task.num_steps)), None

    executor = MeasuredExecutor(took, num_ranks=4)
    await warm_up(executor, card, POOL, COST, card.sizes, lambda done, total, text: told.append((done, total, text)))
    return tasks, told


async def test_every_size_runs_at_every_degree_of_its_own_on_all_aligned_groups_and_is_decoded_on_every_rank() -> None:
    tasks, told = await warmed(CARD)
    pairs, singles = [(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)]
    groups = {SMALL: [*singles, *pairs, (0, 1, 2, 3)], LARGE: [*singles, *pairs]}
    for shape in CARD.sizes:
        assert [ranks for of, stage, ranks, _ in tasks if (of, stage) == (shape, DENOISE)] == groups[shape]
        assert [ranks for of, stage, ranks, _ in tasks if (of, stage) == (shape, DECODE)] == singles
    assert {batch for *_, batch in tasks} == {1}
    assert told == [
        (0, 5, "256x256 at degree 1"), (1, 5, "256x256 at degree 2"), (2, 5, "256x256 at degree 4"),
        (3, 5, "512x512 at degree 1"), (4, 5, "512x512 at degree 2"), (5, 5, "done"),
    ]  # fmt: skip


async def test_compiled_models_run_batches_too_where_they_pay() -> None:
    tasks, told = await warmed(COMPILED)
    batches = {(len(ranks), batch) for shape, stage, ranks, batch in tasks if (shape, stage) == (SMALL, DENOISE)}
    assert batches == {(degree, batch) for degree in (1, 2, 4) for batch in (1, 2, 3, 4)}
    assert {batch for shape, *_, batch in tasks if shape == LARGE} == {1}
    assert (2, 14, "256x256 at degree 1 in a batch of 3") in told


async def test_a_failure_names_what_was_run() -> None:
    class Failing(MeasuredExecutor):
        def start_task(self, command: StartTask) -> None:
            if command.task.degree == 2:
                failed = TaskFailed(command.task_id, FailureKind.MEMORY, "rank 1 ran out of memory")
                asyncio.get_running_loop().call_soon(lambda: self._on_event(failed))
            else:
                super().start_task(command)

    executor = Failing(lambda shape, task, go: (0.1, None), num_ranks=4)
    with pytest.raises(TetriServeError) as caught:
        await warm_up(executor, CARD, POOL, COST, [LARGE], lambda done, total, text: None)
    assert str(caught.value) == "while warming 512x512 at degree 2, rank 1 ran out of memory"


async def test_decodes_that_ranks_share_run_on_the_groups_that_share_them() -> None:
    tasks: list[tuple[Shape, tuple[int, ...]]] = []

    def took(shape: Shape, task: Task, go: int) -> tuple[float, float | None]:
        if task.stage == DECODE:
            tasks.append((shape, task.ranks))
        return quiet_s(Task(task.members, task.stage, (0,), task.num_steps)), None

    shared = Row(stage=DECODE, height=512, width=512, degree=2, seconds=0.05)
    profile = dataclasses.replace(COST.profile, rows=(*COST.profile.rows, shared))
    cost = ProfileCost(profile, COST.degrees_of, batch_limit=8)
    await warm_up(MeasuredExecutor(took, num_ranks=4), CARD, POOL, cost, CARD.sizes, lambda done, total, text: None)
    singles = [(rank,) for rank in range(4)]
    assert tasks == [*((SMALL, ranks) for ranks in singles), *((LARGE, ranks) for ranks in (*singles, (0, 1), (2, 3)))]
