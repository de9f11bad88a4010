"""Measuring a profile: what other work on the machine disturbs is measured again, and what stays disturbed is said."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import pytest
from safetensors.numpy import load

from tests.unit.measured_executor import (
    DECODE_S,
    ENCODE_IMAGE_S,
    ENCODE_S,
    STEP_S,
    MeasuredExecutor,
    Took,
    batch_factor,
    quiet_s,
)
from tetriserve.config import PoolConfig
from tetriserve.core.cluster import aligned_groups
from tetriserve.core.events import StartTask
from tetriserve.core.execution import Execution
from tetriserve.core.plan import Task
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, ENCODE_IMAGE, INPUT
from tetriserve.models.card import ModelCard
from tetriserve.models.tiles import Tiles
from tetriserve.profile import Profile
from tetriserve.profile.table import MIN_TIME_S
from tetriserve.profiler import measure
from tetriserve.profiler.disturbance import fair_share, num_cores

SMALL, LARGE = Shape(256, 256), Shape(512, 512)
CARD = ModelCard(
    name="tiny", path=Path("tiny"), family="flux", pipeline_class="FluxPipeline",
    execution=Execution("float32"), size_multiple=32,
    pixels_per_token=32, num_heads=8, num_text_tokens=64, default_num_steps=20, default_guidance_scale=3.5,
    has_guidance=True, has_negative_prompt=True, sizes=(SMALL, LARGE), fingerprint="abc",
)  # fmt: skip
POOL = PoolConfig(num_ranks=2, max_batch=1)


def quiet(shape: Shape, task: Task, go: int) -> tuple[float, float | None]:
    """Alone on the machine; with others, a rank waits for them half of the time, asleep."""
    return quiet_s(task), quiet_s(task) * (0.97 if task.degree == 1 else 0.5)


def slowed(factor: float, task: Task) -> tuple[float, float | None]:
    """Beside other processes: all takes longer, and as much computing as before."""
    return factor * quiet_s(task), quiet_s(task)


async def measured(took: Took, *, share: float = 1.0) -> tuple[Profile, MeasuredExecutor]:
    executor = MeasuredExecutor(took)
    profile = await measure(executor, CARD, POOL, CARD.sizes, lambda done, total, text: None, share=share)
    return profile, executor


async def test_on_a_quiet_machine_every_shape_is_measured_once() -> None:
    profile, executor = await measured(quiet)
    assert profile.doubt == ""
    assert executor.goes == {SMALL: 1, LARGE: 1}
    assert {(row.shape, row.degree): row.seconds for row in profile.rows_of(DENOISE)} == pytest.approx(
        {(shape, degree): step_s for shape in CARD.sizes for degree, step_s in STEP_S.items()}
    )
    assert [row.seconds for row in profile.rows_of(DECODE)] == [DECODE_S, DECODE_S]
    assert [row.seconds for row in profile.rows_of(ENCODE)] == [ENCODE_S]


@pytest.mark.parametrize("encoders", [1, 2])
async def test_encode_is_measured_on_ranks_with_encoders_and_steps_on_all_at_once(encoders: int) -> None:
    tasks: list[Task] = []

    def took(shape: Shape, task: Task, go: int) -> tuple[float, float | None]:
        tasks.append(task)
        return quiet(shape, task, go)

    pool = PoolConfig(num_ranks=4, encoder_ranks=encoders, degrees=(1, 2), max_batch=1)
    executor = MeasuredExecutor(took, num_ranks=4)
    profile = await measure(executor, CARD, pool, [SMALL], lambda done, total, text: None, share=1.0)
    assert [row.seconds for row in profile.rows_of(ENCODE)] == [ENCODE_S]
    ranks_of = {stage: {task.ranks for task in tasks if task.stage == stage} for stage in (ENCODE, DENOISE, DECODE)}
    assert ranks_of[ENCODE] == {(rank,) for rank in range(encoders)}
    assert ranks_of[DENOISE] == {*((rank,) for rank in range(4)), (0, 1), (2, 3)}
    assert ranks_of[DECODE] == {(rank,) for rank in range(4)}


async def test_a_first_run_that_compiles_is_neither_a_sample_nor_a_reason_for_fewer() -> None:
    seen: set[tuple[Shape, str, int]] = set()
    counts: Counter[tuple[str, int]] = Counter()

    def took(shape: Shape, task: Task, go: int) -> tuple[float, float | None]:
        counts[task.stage, task.degree] += 1
        key = shape, task.stage, task.degree
        if task.stage == ENCODE or key in seen:
            return quiet(shape, task, go)
        seen.add(key)
        return 60.0, 60.0

    executor = MeasuredExecutor(took, num_ranks=1)
    pool = PoolConfig(num_ranks=1, max_batch=1)
    profile = await measure(executor, CARD, pool, [SMALL], lambda done, total, text: None, share=1.0)
    assert [row.seconds for row in profile.rows_of(DENOISE)] == pytest.approx([STEP_S[1]])
    assert [row.seconds for row in profile.rows_of(DECODE)] == [DECODE_S]
    steps_before_decode = 1
    assert counts == {(ENCODE, 1): 2, (DENOISE, 1): 1 + 1 + 5 + steps_before_decode, (DECODE, 1): 1 + 1}


async def test_a_shape_that_was_disturbed_is_measured_again_and_the_disturbed_times_are_dropped() -> None:
    def took(shape: Shape, task: Task, go: int) -> tuple[float, float | None]:
        return slowed(3.0, task) if shape == LARGE and go == 0 else quiet(shape, task, go)

    profile, executor = await measured(took)
    assert executor.goes == {SMALL: 1, LARGE: 2}
    assert profile.doubt == ""
    assert [row.seconds for row in profile.rows_of(ENCODE)] == [ENCODE_S]
    assert [row.seconds for row in profile.rows_of(DENOISE)] == pytest.approx([0.4, 0.25, 0.4, 0.25])
    assert [row.seconds for row in profile.rows_of(DECODE)] == [DECODE_S, DECODE_S]


async def test_on_a_machine_that_stays_busy_the_smallest_shape_is_tried_thrice_and_the_best_is_kept_in_doubt() -> None:
    factors = {0: 3.0, 1: 1.5, 2: 5.0}
    profile, executor = await measured(lambda shape, task, go: slowed(factors.get(go, 1.0), task))
    assert executor.goes == {SMALL: 3, LARGE: 1}
    assert [row.seconds for row in profile.rows_of(DENOISE)] == pytest.approx([0.6, 0.375, 1.2, 0.75])
    assert profile.doubt == "256x256 at degree 1: workers had a processor for 67% of the time, and 1 more sizes"


@pytest.mark.parametrize("stage", [DENOISE, DECODE])
async def test_work_that_disturbs_only_one_stage_is_noticed(stage: str) -> None:
    def took(shape: Shape, task: Task, go: int) -> tuple[float, float | None]:
        return slowed(2.0, task) if task.stage == stage and go == 0 else quiet(shape, task, go)

    _, executor = await measured(took)
    assert executor.goes == {SMALL: 2, LARGE: 2}


async def test_where_processor_time_says_nothing_repeats_that_differ_do_and_a_single_hiccup_does_not() -> None:
    jitter = itertools.cycle([1.0, 1.0, 1.8, 1.0, 1.8])
    profile, executor = await measured(lambda shape, task, go: (next(jitter) * quiet_s(task), None))
    assert executor.goes == {SMALL: 3, LARGE: 1}
    assert "repeats lie 80% apart" in profile.doubt
    hiccup = itertools.cycle([1.0] * 9 + [4.0])
    profile, executor = await measured(lambda shape, task, go: (next(hiccup) * quiet_s(task), None))
    assert executor.goes == {SMALL: 1, LARGE: 1}
    assert profile.doubt == ""


async def test_ranks_that_share_a_processor_with_each_other_are_not_taken_for_other_work() -> None:
    profile, _ = await measured(lambda shape, task, go: slowed(2.0, task), share=0.5)
    assert profile.doubt == ""
    profile, _ = await measured(lambda shape, task, go: slowed(3.0, task), share=0.5)
    assert "workers had a processor for 33% of the time" in profile.doubt


async def test_progress_counts_what_is_repeated_and_ends_complete() -> None:
    told: list[tuple[int, int]] = []

    def took(shape: Shape, task: Task, go: int) -> tuple[float, float | None]:
        return slowed(3.0, task) if shape == LARGE and go == 0 else quiet(shape, task, go)

    await measure(
        MeasuredExecutor(took), CARD, POOL, CARD.sizes, lambda done, total, text: told.append((done, total)), share=1.0
    )
    assert told == [*((done, 6) for done in range(6)), *((done, 9) for done in range(6, 9)), (9, 9)]


@pytest.mark.parametrize(
    ("max_batch", "found"), [(1, []), (2, [2]), (3, [2, 3]), (4, [2, 4]), (6, [2, 4, 6]), (64, [2, 4, 8])]
)
async def test_batches_are_measured_at_the_narrowest_degree_for_as_long_as_they_pay(
    max_batch: int, found: list[int]
) -> None:
    told: list[tuple[int, int]] = []
    pool = PoolConfig(num_ranks=2, max_batch=max_batch)
    executor = MeasuredExecutor(quiet)
    profile = await measure(
        executor, CARD, pool, [SMALL], lambda done, total, text: told.append((done, total)), share=1.0
    )
    rows = [row for row in profile.rows_of(DENOISE) if row.batch > 1]
    assert [(row.degree, row.batch) for row in rows] == [(1, batch) for batch in found]
    assert [row.seconds for row in rows] == pytest.approx([STEP_S[1] * batch_factor(batch) for batch in found])
    assert profile.max_batch == max_batch
    assert told[-1] == (len(told) - 1, len(told) - 1)


async def test_a_larger_batch_that_seemed_quicker_counts_as_long_as_the_smaller() -> None:
    def took(shape: Shape, task: Task, go: int) -> tuple[float, float | None]:
        return (0.01 * task.num_steps, None) if task.batch == 4 else quiet(shape, task, go)

    pool = PoolConfig(num_ranks=2, max_batch=4)
    profile = await measure(MeasuredExecutor(took), CARD, pool, [SMALL], lambda done, total, text: None, share=0.0)
    by_batch = {row.batch: row.seconds for row in profile.rows_of(DENOISE) if row.degree == 1}
    assert by_batch[4] == by_batch[2] == pytest.approx(STEP_S[1] * 1.5)


@pytest.mark.parametrize(
    ("collectives", "num_ranks", "team_s"),
    [
        ("shm", 4, 0.0),
        ("torch", 4, 0.8),
        ("torch", 2, MIN_TIME_S),  # the only set of two ranks, an aligned one, has worked together before
    ],
)
async def test_what_it_costs_to_form_a_set_of_ranks_is_measured_for_torch_and_nothing_over_shared_memory(
    collectives: str, num_ranks: int, team_s: float
) -> None:
    formed = {ranks for degree in (1, 2) for ranks in aligned_groups(num_ranks, degree)}

    def took(shape: Shape, task: Task, go: int) -> tuple[float, float | None]:
        forming_s = 0.0 if task.ranks in formed else 0.8
        formed.add(task.ranks)
        return quiet_s(task) + forming_s, None

    pool = PoolConfig(num_ranks=num_ranks, degrees=(1, 2), collectives=collectives, max_batch=1)
    executor = MeasuredExecutor(took, num_ranks)
    profile = await measure(executor, CARD, pool, [SMALL], lambda done, total, text: None, share=0.0)
    assert profile.team_s == pytest.approx(team_s)


def test_a_container_quota_counts_as_so_many_processors(tmp_path: Path) -> None:
    all_of_them = num_cores(tmp_path)
    assert all_of_them >= 1
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert num_cores(tmp_path) == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert num_cores(tmp_path) == all_of_them
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert num_cores(tmp_path) == all_of_them
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("25000\n")
    assert num_cores(tmp_path) == 0.25


def test_the_fair_share_of_a_worker_is_a_whole_processor_unless_there_are_more_threads_than_processors() -> None:
    cores = num_cores()
    assert fair_share(PoolConfig(num_ranks=1)) == min(1.0, cores)
    assert fair_share(PoolConfig(num_ranks=1000, degrees=(1,))) == pytest.approx(min(1.0, cores / 1000))
    assert fair_share(PoolConfig(num_ranks=1, num_threads=1000)) == pytest.approx(min(1.0, cores / 1000))
    assert fair_share(PoolConfig(num_ranks=1000, degrees=(1,), device="cuda")) == 1.0


class WithPictures(MeasuredExecutor):
    """Notes the pictures that are there when they are encoded."""

    def __init__(self, took: Took) -> None:
        super().__init__(took)
        self.encoded: list[tuple[int, tuple[int, ...]]] = []

    def start_task(self, command: StartTask) -> None:
        [work] = command.work
        if command.task.stage == ENCODE_IMAGE:
            pictures = load(self.states.get(work.states[INPUT]))
            self.encoded.append((len(pictures), pictures["0"].shape))
        super().start_task(command)


@pytest.mark.parametrize("min_images", [0, 2])
async def test_of_a_model_that_takes_pictures_their_encoding_is_measured_by_size(min_images: int) -> None:
    card = dataclasses.replace(CARD, min_images=min_images, max_images=max(1, min_images), default_strength=0.6)
    executor = WithPictures(quiet)
    told: list[tuple[int, int]] = []
    profile = await measure(
        executor, card, POOL, card.sizes, lambda done, total, text: told.append((done, total)), share=1.0
    )
    rows = profile.rows_of(ENCODE_IMAGE)
    assert [(row.shape, row.seconds, row.tokens) for row in rows] == [
        (SMALL, ENCODE_IMAGE_S, None), (LARGE, ENCODE_IMAGE_S, None)
    ]  # fmt: skip
    assert profile.stages == (ENCODE, DENOISE, ENCODE_IMAGE, DECODE)
    assert set(executor.encoded) == {(max(1, min_images), (side, side, 3)) for side in (256, 512)}
    assert [row.seconds for row in profile.rows_of(ENCODE)] == [ENCODE_S]
    assert told[-1] == (8, 8)


async def test_of_a_model_that_takes_none_it_is_not() -> None:
    profile, _ = await measured(quiet)
    assert ENCODE_IMAGE not in profile.stages


async def test_decodes_in_tiles_are_measured_at_every_degree_that_a_size_has_tiles_for_on_all_groups_at_once() -> None:
    tiles, told, decodes = Tiles(side=32, stride=24, scale=8), [], []

    def took(shape: Shape, task: Task, go: int) -> tuple[float, float | None]:
        if task.stage == DECODE:
            decodes.append((shape, task.ranks))
        return quiet_s(Task(task.members, task.stage, (0,), task.num_steps)) / task.degree, None

    card = dataclasses.replace(CARD, execution=Execution("float32", tiling="vae"), tiles=tiles)
    pool = PoolConfig(num_ranks=4, degrees=(1, 2, 4), max_batch=1)
    wide = Shape(192, 384)
    assert [tiles.count(shape) for shape in (SMALL, LARGE, wide)] == [1, 9, 2]
    profile = await measure(
        MeasuredExecutor(took, num_ranks=4), card, pool, [SMALL, LARGE, wide],
        lambda done, total, text: told.append((done, total, text)), share=1.0,
    )  # fmt: skip
    assert {(row.shape, row.degree): row.seconds for row in profile.rows_of(DECODE)} == {
        (SMALL, 1): DECODE_S,
        **{(LARGE, degree): DECODE_S / degree for degree in (1, 2, 4)},
        **{(wide, degree): DECODE_S / degree for degree in (1, 2)},
    }
    assert {(row.tokens, row.batch) for row in profile.rows_of(DECODE)} == {(None, 1)}
    pairs = [(0, 1), (2, 3)]
    assert {ranks for shape, ranks in decodes if shape == LARGE and len(ranks) > 1} == {*pairs, (0, 1, 2, 3)}
    assert decodes.count((wide, (0, 1))) == decodes.count((wide, (2, 3))) == 6
    assert profile.doubt == ""
    assert told[-1][:2] == (15, 15)
    assert "decode of 512x512 at degree 4" in [text for *_, text in told]


async def test_without_tiling_a_decode_has_one_degree() -> None:
    card = dataclasses.replace(CARD, tiles=Tiles(side=32, stride=24, scale=8))
    profile = await measure(MeasuredExecutor(quiet), card, POOL, [LARGE], lambda done, total, text: None, share=1.0)
    assert [row.degree for row in profile.rows_of(DECODE)] == [1]
