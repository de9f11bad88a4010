"""Times every stage of a model on a running executor, under the load that serving brings: all ranks at work."""

from __future__ import annotations

import asyncio
import datetime
import logging
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from tetriserve.config import PoolConfig
from tetriserve.core.cluster import aligned_groups
from tetriserve.core.cost import pays
from tetriserve.core.events import TaskFinished
from tetriserve.core.request import Lora, Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, ENCODE_IMAGE
from tetriserve.executor.protocol import Executor
from tetriserve.models.card import ModelCard
from tetriserve.models.registry import family_of
from tetriserve.profile.table import MIN_TIME_S, Profile, Row
from tetriserve.profiler.bench import Bench
from tetriserve.profiler.disturbance import disturbance, fair_share
from tetriserve.profiler.hardware import hardware_name

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int, str], None]
"""Called with how many measurements are done, how many there are, and what comes next."""

_NUM_SAMPLES = 5
_STEPS_PER_SAMPLE = 2
_NUM_STEPS = 2 + _NUM_SAMPLES * _STEPS_PER_SAMPLE
_NUM_MOVES = 8
_SLOW_STEP_S = 2.0
_MAX_REPEATS = 2
"""How often shapes are measured again because other work disturbed them."""


async def measure(
    executor: Executor,
    card: ModelCard,
    pool: PoolConfig,
    shapes: Sequence[Shape],
    on_progress: OnProgress,
    *,
    share: float | None = None,
) -> Profile:
    """A profile of `card` on this machine for `shapes`, of steps and of decodes in tiles at every degree of `pool`, the
    model's part, that suits them.

    Each degree is timed with all its aligned groups at work at once, as they are when a server is busy: on GPUs that
    changes nothing, on a CPU the ranks share cores, caches and memory.

    Batches of 2, 4 and so on, up to the pool's largest, are timed at the narrowest degree for as long as they pay.

    Shapes that other work on the machine disturbed are measured again, the smallest first, and the best counts; what
    still is in doubt then, the profile says. Work that only slows memory or a GPU down, steadily, is not noticed.

    Args:
        share: of a processor that each worker thread gets on the quiet machine; None finds out, 0 asks for nothing.

    Raises:
        TetriServeError: a worker failed or was lost while measuring.
    """
    bench, count = Bench.of(executor, "measuring a profile", card, pool), _Count(on_progress)
    best, doubt = await _time_shapes(bench, card, shapes, pool, fair_share(pool) if share is None else share, count)
    move_s = await _time_moves(bench, card, shapes[0], pool)
    team_s = await _time_team(bench, card, shapes[0], pool)
    lora_s = await _time_lora(bench, card, shapes[0]) if card.loras else 0.0
    count.end()
    return Profile(
        model=card.name,
        fingerprint=card.fingerprint,
        hardware=hardware_name(pool),
        execution=card.execution,
        source="measured by tetriserve, all ranks at work",
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
        switch_s=max(statistics.median(seconds for times in best.values() for seconds in times.switch_s), MIN_TIME_S),
        move_s=move_s,
        team_s=team_s,
        lora_s=lora_s,
        rows=(
            Row(stage=ENCODE, seconds=statistics.median(s for times in best.values() for s in times.encode_s)),
            *(row for shape in shapes for row in best[shape].denoise),
            *(row for shape in shapes if (row := best[shape].encode_image) is not None),
            *(row for shape in shapes for row in best[shape].decode),
        ),
        doubt=doubt,
        max_batch=pool.max_batch,
        frame_step=max(card.frame_step, 1),
    )


@dataclass(frozen=True, kw_only=True)
class _ShapeTimes:
    """What one go at measuring a shape gave. doubt: what disturbed it; empty if nothing did."""

    denoise: list[Row]
    decode: list[Row]
    encode_image: Row | None
    encode_s: list[float]
    switch_s: list[float]
    doubt: str

    @property
    def total_s(self) -> float:
        """Other work only ever adds to it."""
        return sum(row.seconds for row in (*self.denoise, *self.decode) if row.batch == 1)


@dataclass
class _Count:
    """Counts measurements. There are more of them when some are repeated."""

    on_progress: OnProgress
    num_total: int = 0
    num_done: int = 0

    def expect(self, num_more: int) -> None:
        self.num_total = self.num_done + num_more

    def next(self, text: str) -> None:
        self.on_progress(self.num_done, self.num_total, text)
        self.num_done += 1

    def skip(self, num_fewer: int) -> None:
        self.num_total -= num_fewer

    def end(self) -> None:
        self.on_progress(self.num_total, self.num_total, "done")


async def _time_shapes(
    bench: Bench, card: ModelCard, shapes: Sequence[Shape], pool: PoolConfig, share: float, count: _Count
) -> tuple[dict[Shape, _ShapeTimes], str]:
    """The best times of each shape, and what speaks against them; empty if nothing does."""
    best: dict[Shape, _ShapeTimes] = {}
    waiting = list(shapes)
    for number in range(1 + _MAX_REPEATS):
        num_steps = len(card.valid_degrees(pool.degrees)) + len(_batches(pool))
        num_decodes = sum(len(card.short_degrees(DECODE, shape, pool.degrees)) for shape in waiting)
        count.expect(num_decodes + len(waiting) * (num_steps + (1 if card.max_images else 0)))
        for shape in waiting:
            times = await _time_shape(bench, card, shape, pool, share, count)
            best[shape] = min(best.get(shape, times), times, key=lambda each: (each.doubt != "", each.total_s))
            if number > 0 and times.doubt:
                break  # still busy: larger shapes would take longer to say the same
        waiting = sorted((shape for shape in shapes if best[shape].doubt), key=lambda shape: shape.num_pixels)
        if not waiting:
            return best, ""
        doubt = best[waiting[0]].doubt + (f", and {len(waiting) - 1} more sizes" if len(waiting) > 1 else "")
        logger.info("the machine was busy while measuring (%s)", doubt)
    return best, doubt


async def _time_shape(
    bench: Bench, card: ModelCard, shape: Shape, pool: PoolConfig, share: float, count: _Count
) -> _ShapeTimes:
    """All that is measured of a shape, together: what disturbs one degree may disturb the others unseen."""
    bench.encode_s, bench.switch_s = [], []
    denoise: list[Row] = []
    doubts: list[str] = []

    def judge(what: str, samples: Sequence[TaskFinished], degree: int) -> None:
        if doubt := disturbance(samples, is_local=degree == 1, fair_share=share):
            doubts.append(f"{what}: {doubt}")

    for degree in card.valid_degrees(pool.degrees):
        what = f"{shape} at degree {degree}"
        count.next(what)
        groups = aligned_groups(pool.num_ranks, degree)
        row, samples = await _time_steps(bench, card, shape, degree, groups)
        denoise.append(row)
        judge(what, samples, degree)
        if len(denoise) == 1:
            denoise += await _time_batches(bench, card, row, groups, pool, count, judge)
    decode: list[Row] = []
    for degree in card.short_degrees(DECODE, shape, pool.degrees):
        what = f"decode of {shape}" + (f" at degree {degree}" if degree > 1 else "")
        count.next(what)
        row, samples = await _time_decode(bench, card, shape, degree, aligned_groups(pool.num_ranks, degree))
        decode.append(row)
        judge(what, samples, degree)
    encode_image = None
    if card.max_images:
        if card.min_images:
            bench.encode_s = []  # a text without a picture takes less time
        what = f"encoding a picture of {shape}"
        count.next(what)
        encode_image, samples = await _time_encode_image(bench, card, shape, pool.num_ranks)
        judge(what, samples, 1)
    return _ShapeTimes(
        denoise=denoise, decode=decode, encode_image=encode_image, encode_s=bench.encode_s, switch_s=bench.switch_s,
        doubt=next(iter(doubts), ""),
    )  # fmt: skip


def _batches(pool: PoolConfig) -> list[int]:
    """The powers of two up to the pool's largest, and that."""
    powers = {2**number for number in range(1, pool.max_batch.bit_length())}
    return sorted((powers | {pool.max_batch}) - {1})


async def _time_batches(
    bench: Bench,
    card: ModelCard,
    single: Row,
    groups: Sequence[tuple[int, ...]],
    pool: PoolConfig,
    count: _Count,
    judge: Callable[[str, Sequence[TaskFinished], int], None],
) -> list[Row]:
    """Rows of larger and larger batches, up to the first that saves no more: between rows, times are interpolated."""
    assert single.shape is not None
    rows: list[Row] = []
    before, batches = single, _batches(pool)
    for number, batch in enumerate(batches):
        what = f"{single.shape} in a batch of {batch}"
        count.next(what)
        row, samples = await _time_steps(bench, card, single.shape, single.degree, groups, batch)
        judge(what, samples, single.degree)
        row = replace(row, seconds=max(row.seconds, before.seconds))
        rows.append(row)
        if not pays(row.seconds, batch, single.seconds) or row.seconds / batch > before.seconds / before.batch:
            count.skip(len(batches) - number - 1)
            break
        before = row
    return rows


async def _time_steps(
    bench: Bench, card: ModelCard, shape: Shape, degree: int, groups: Sequence[tuple[int, ...]], batch: int = 1
) -> tuple[Row, list[TaskFinished]]:
    parties = [[bench.request(card, shape, _NUM_STEPS) for _ in range(batch)] for _ in groups]
    for number in range(batch):
        pairs = zip(parties, groups, strict=True)
        await asyncio.gather(*(bench.encode(requests[number], group[0]) for requests, group in pairs))

    async def run(num_steps: int) -> list[TaskFinished]:
        pairs = zip(parties, groups, strict=True)
        return await asyncio.gather(*(bench.denoise(requests, group, num_steps) for requests, group in pairs))

    first_s = max(finished.elapsed_s for finished in await run(1))  # also allocates, and may compile
    if first_s > _SLOW_STEP_S:
        first_s = max(finished.elapsed_s for finished in await run(1))
    num_samples, num_steps = (2, 1) if first_s > _SLOW_STEP_S else (_NUM_SAMPLES, _STEPS_PER_SAMPLE)
    samples = [each for _ in range(num_samples) for each in await run(num_steps)]
    for requests in parties:
        bench.forget(requests)
    step_s = [sample.elapsed_s / num_steps for sample in samples]
    middle = statistics.median(step_s)
    row = Row(
        stage=DENOISE,
        height=shape.height,
        width=shape.width,
        frames=shape.frames,
        tokens=family_of(card).num_tokens(card, shape),
        degree=degree,
        batch=batch,
        seconds=middle,
        cv=statistics.stdev(step_s) / middle,
    )
    return row, samples


async def _time_decode(
    bench: Bench, card: ModelCard, shape: Shape, degree: int, groups: Sequence[tuple[int, ...]]
) -> tuple[Row, list[TaskFinished]]:
    requests = [bench.request(card, shape, _NUM_STEPS) for _ in groups]
    pairs = [*zip(requests, groups, strict=True)]
    await asyncio.gather(*(bench.encode(request, group[0]) for request, group in pairs))
    await asyncio.gather(*(bench.denoise([request], group[:1], 1) for request, group in pairs))
    return await _time_short(bench, DECODE, shape, degree, pairs, bench.decode)


async def _time_encode_image(
    bench: Bench, card: ModelCard, shape: Shape, num_ranks: int
) -> tuple[Row, list[TaskFinished]]:
    """Of one picture, after its text."""
    pairs = [(bench.request_with_picture(card, shape), group) for group in aligned_groups(num_ranks, 1)]
    await asyncio.gather(*(bench.encode(request, group[0]) for request, group in pairs))
    return await _time_short(bench, ENCODE_IMAGE, shape, 1, pairs, bench.encode_image)


async def _time_short(
    bench: Bench,
    stage: str,
    shape: Shape,
    degree: int,
    pairs: Sequence[tuple[Request, tuple[int, ...]]],
    run_one: Callable[[Request, tuple[int, ...]], Awaitable[TaskFinished]],
) -> tuple[Row, list[TaskFinished]]:
    """A stage without steps, on all groups at once, each with a request of its own."""

    async def run() -> list[TaskFinished]:
        return await asyncio.gather(*(run_one(request, group) for request, group in pairs))

    first = await run()  # also allocates
    is_slow = max(finished.elapsed_s for finished in first) > _SLOW_STEP_S
    samples = [each for _ in range(1 if is_slow else _NUM_SAMPLES) for each in await run()]
    bench.forget([request for request, _ in pairs])
    seconds = statistics.median(sample.elapsed_s for sample in samples)
    row = Row(stage=stage, height=shape.height, width=shape.width, frames=shape.frames, degree=degree, seconds=seconds)
    return row, samples


async def _time_moves(bench: Bench, card: ModelCard, shape: Shape, pool: PoolConfig) -> float:
    """How much longer one step takes right after a move than in place, at the narrowest degree with another group."""
    for degree in card.valid_degrees(pool.degrees):
        groups = aligned_groups(pool.num_ranks, degree)
        if len(groups) < 2:
            continue
        request = bench.request(card, shape, 2 + 2 * _NUM_MOVES)
        await bench.encode(request, groups[0][0])
        for group in groups[:2]:  # the first collective of a group allocates
            await bench.denoise([request], group, 1)
        differences = []
        for index in range(_NUM_MOVES):
            group = groups[index % 2]
            moved = await bench.denoise([request], group, 1)
            stayed = await bench.denoise([request], group, 1)
            differences.append(moved.elapsed_s - stayed.elapsed_s)
        bench.forget([request])
        return max(statistics.median(differences), MIN_TIME_S)
    return 0.0


async def _time_team(bench: Bench, card: ModelCard, shape: Shape, pool: PoolConfig) -> float:
    """How much longer one step takes on ranks that have not worked together before than right after it.

    Aligned groups have, so the ranks are those of an aligned group of the narrowest degree, each plus one. One sample:
    what counts is whether it is next to nothing. Over shared memory it is nothing, for torch never, so that a pool with
    only one set of ranks, where it cannot be measured, keeps to that one as well.
    """
    if pool.collectives == "shm":
        return 0.0
    degree = next((degree for degree in card.valid_degrees(pool.degrees) if 1 < degree < pool.num_ranks), None)
    if degree is None:
        return MIN_TIME_S
    request = bench.request(card, shape, 2)
    group = tuple(range(1, degree + 1))
    await bench.encode(request, group[0])
    first, second = [await bench.denoise([request], group, 1) for _ in range(2)]
    bench.forget([request])
    return max(first.elapsed_s - second.elapsed_s, MIN_TIME_S)


async def measure_lora(executor: Executor, card: ModelCard, pool: PoolConfig, shape: Shape) -> float:
    """`Profile.lora_s` of a card with adapters, alone.

    Raises:
        TetriServeError: a worker failed or was lost while measuring.
    """
    return await _time_lora(Bench.of(executor, "measuring a change of LoRAs", card, pool), card, shape)


async def _time_lora(bench: Bench, card: ModelCard, shape: Shape) -> float:
    """How much longer one step takes on a rank that has another adapter active than right after it: the median.

    Between the first two adapters, or the only one and none.
    """
    wanted = [Lora(lora.name) for lora in card.loras[:2]]
    requests = [bench.request(card, shape, 2 * _NUM_MOVES, lora) for lora in (*wanted, None)][:2]
    for request in requests:
        await bench.encode(request, 0)
    differences = []
    for _ in range(_NUM_MOVES):
        for request in requests:
            switched = await bench.denoise([request], (0,), 1)
            stayed = await bench.denoise([request], (0,), 1)
            differences.append(switched.elapsed_s - stayed.elapsed_s)
    bench.forget(requests)
    return max(statistics.median(differences), MIN_TIME_S)
