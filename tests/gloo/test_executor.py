"""The local executor on real processes: whatever ranks and degrees a request runs on, its image is the same."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.waiting import HANG_S
from tetriserve.config import COLLECTIVES, PoolConfig
from tetriserve.core.errors import ConfigError
from tetriserve.core.events import Event, StartTask, TaskFailed, TaskFinished, Work
from tetriserve.core.events import Result as Left
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, image_stages
from tetriserve.executor.local import LocalExecutor
from tetriserve.models.card import ModelCard
from tetriserve.models.checkpoint import read_card
from tetriserve.models.flux.adapter import FluxAdapter
from tetriserve.profiler import measure
from tetriserve.worker.bundle import arrays_of

NUM_RANKS, MAX_GROUPS = 4, 1
LATENTS_TOLERANCE, PIXEL_TOLERANCE = 1e-4, 1

Ranks = tuple[int, ...]
Plan = Sequence[tuple[Ranks, int]]
"""Denoise tasks in order: the ranks, and how many steps."""


def make_request(prompt: str, num_steps: int = 5, shape: Shape = Shape(256, 256), **rest: object) -> Request:  # noqa: B008
    stages = image_stages(num_steps, 2 if "negative_prompt" in rest else 1)
    return Request(
        request_id="r", prompt=prompt, shape=shape, stages=stages, seed=len(prompt), arrival_s=0.0,
        deadline_s=0.0, **rest,  # type: ignore[arg-type]
    )  # fmt: skip


REQUESTS = (
    make_request("a red circle"),
    make_request("a blue square on sand", 6),
    make_request("a long river", 4, Shape(height=128, width=256)),
    make_request("a green tree", 3, negative_prompt="blurry", true_cfg_scale=3.0),
)


@dataclass(frozen=True)
class Result:
    latents: torch.Tensor
    pixels: np.ndarray


def begun(request: Request) -> Work:
    return Work(request, 0, 0, {})


def after(work: Work, stage: str, left: Left) -> Work:
    trajectory = work.trajectory.after(left.num_steps, is_stage_over=left.is_stage_over)
    states = {**work.states, stage: left.left}
    return Work(work.request, trajectory.stage_index, trajectory.stage_steps_done, states)


class Driver:
    """Carries requests through an executor by plans of its own; tasks that want a busy rank wait for it."""

    def __init__(self, executor: LocalExecutor) -> None:
        self.executor = executor
        self.store = executor.states
        self._ids = itertools.count()
        self._ended: dict[int, asyncio.Future[TaskFinished]] = {}
        self._rank_locks = [asyncio.Lock() for _ in range(NUM_RANKS)]
        executor.subscribe(self._on_event)

    @property
    def directory(self) -> Path:
        return self.executor._directory.path

    def files(self, request_id: str) -> list[str]:
        """What the store holds of a request."""
        return sorted(path.name for path in self.directory.glob(f"{request_id}.*"))

    async def carry(self, request: Request, plan: Plan, encode_rank: int = 0, decode_rank: int = 0) -> Result:
        """All of a request, its steps as `plan` says."""
        assert sum(num_steps for _, num_steps in plan) == request.num_steps
        request = dataclasses.replace(request, request_id=f"request-{next(self._ids)}")
        request_id = request.request_id
        (work,) = await self.advance(Task((request_id,), ENCODE, (encode_rank,)), begun(request))
        for ranks, num_steps in plan:
            (work,) = await self.advance(Task((request_id,), DENOISE, ranks, num_steps), work)
            assert self.files(request_id) == [f"{work.states[stage].key}.safetensors" for stage in (DENOISE, ENCODE)]
        (work,) = await self.advance(Task((request_id,), DECODE, (decode_rank,)), work)
        return self.take(work)

    def take(self, work: Work) -> Result:
        """What a finished request left, which is forgotten."""
        latents = self.store.load(work.states[DENOISE], "cpu")["latents"]
        result = Result(latents, arrays_of(self.store.get(work.states[DECODE]))["pixels"])
        self.executor.forget(work.request.request_id)
        assert self.files(work.request.request_id) == []
        return result

    async def advance(self, task: Task, *works: Work) -> list[Work]:
        """Where the task's members stand after it."""
        finished = await self.run(task, *works)
        return [after(work, task.stage, left) for work, left in zip(works, finished.results, strict=True)]

    async def run(self, task: Task, *works: Work) -> TaskFinished:
        async with contextlib.AsyncExitStack() as stack:
            for rank in sorted(task.ranks):
                await stack.enter_async_context(self._rank_locks[rank])
            task_id = next(self._ids)
            self._ended[task_id] = asyncio.get_running_loop().create_future()
            self.executor.start_task(StartTask(task_id, task, works))
            return await asyncio.wait_for(self._ended[task_id], HANG_S)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, TaskFinished):
            self._ended.pop(event.task_id).set_result(event)
        elif isinstance(event, TaskFailed):
            self._ended.pop(event.task_id).set_exception(RuntimeError(event.message))


@pytest.fixture(scope="module", params=COLLECTIVES)
async def driver(request: pytest.FixtureRequest, bundled_card: ModelCard) -> AsyncIterator[Driver]:
    """Four ranks with room for one process group only, so that groups are dropped and formed again all the time."""
    pool = PoolConfig(num_ranks=NUM_RANKS, collectives=request.param, max_groups=MAX_GROUPS, heartbeat_timeout_s=HANG_S)
    executor = LocalExecutor([bundled_card], pool)
    await executor.start(lambda text: None)
    driver = Driver(executor)
    yield driver
    pids = executor.pids
    assert executor.num_restarts == 0
    await executor.stop()
    assert not driver.directory.exists()
    assert not [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()]


@pytest.fixture(scope="module")
def alone(reference: FluxAdapter) -> list[Result]:
    """Every request of `REQUESTS` at degree 1 in this process."""
    results = []
    for request in REQUESTS:
        loop = reference.denoise_loop(request, reference.encode(request), 0)
        latents = reference.initial_latents(request)
        for _ in range(request.num_steps):
            latents = loop.step(latents)
        results.append(Result(latents, reference.decode(request, latents)))
    return results


def assert_same(result: Result, expected: Result) -> None:
    assert result.latents.shape == expected.latents.shape
    assert (result.latents - expected.latents).abs().max().item() < LATENTS_TOLERANCE
    assert result.pixels.shape == expected.pixels.shape
    assert np.abs(result.pixels.astype(int) - expected.pixels).max() <= PIXEL_TOLERANCE


def random_plan(rng: random.Random, num_steps: int) -> Plan:
    """Tasks on any sets of ranks, aligned or not, in any order of degrees."""
    plan: list[tuple[Ranks, int]] = []
    while num_steps:
        steps = rng.randint(1, min(3, num_steps))
        plan.append((tuple(sorted(rng.sample(range(NUM_RANKS), rng.choice([1, 2, 2, 4])))), steps))
        num_steps -= steps
    return plan


def test_workers_map_one_copy_of_the_weights(driver: Driver, reference: FluxAdapter) -> None:
    num_bytes = sum(weight.nbytes for weight in reference.weights)
    for pid in driver.executor.pids.values():
        regions = Path(f"/proc/{pid}/smaps").read_text().split("VmFlags:")
        [mapped] = [
            text for text in regions if "memfd:tetriserve-team" in text and _kilobytes(text, "Size") * 1024 >= num_bytes
        ]
        assert _kilobytes(mapped, "Private_Dirty") == 0, "no worker has written to it, which would give it a copy"


def _kilobytes(text: str, name: str) -> int:
    """Of one mapping in `smaps`."""
    return int(text.partition(f"\n{name}:")[2].split()[0])


async def test_degree_1_is_bit_identical_to_the_pipeline(driver: Driver, bundled_dir: Path) -> None:
    from diffusers import FluxPipeline

    request = REQUESTS[3]
    result = await driver.carry(request, [((2,), 2), ((0,), 1)], encode_rank=1, decode_rank=3)
    pipeline = FluxPipeline.from_pretrained(bundled_dir, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    latents, images = (
        pipeline(
            prompt=request.prompt, negative_prompt=request.negative_prompt, true_cfg_scale=request.true_cfg_scale,
            height=request.shape.height, width=request.shape.width, num_inference_steps=request.num_steps,
            guidance_scale=request.guidance_scale, max_sequence_length=40, output_type=output_type,
            generator=torch.Generator("cpu").manual_seed(request.seed),
        ).images
        for output_type in ("latent", "pil")
    )  # fmt: skip
    assert torch.equal(result.latents, latents)
    assert np.array_equal(result.pixels, np.asarray(images[0]))


@pytest.mark.parametrize(
    "plan",
    [
        [((0, 2), 2), ((1, 3), 3)],
        [((0, 1, 2, 3), 5)],
        [((2,), 1), ((1, 2), 1), ((0, 1, 2, 3), 1), ((0, 3), 1), ((3,), 1)],
        [((0, 1), 1), ((0,), 1), ((0, 1), 1), ((1,), 1), ((0, 1), 1)],
        [((3, 1), 2), ((1, 3), 1), ((2, 0, 3, 1), 2)],
    ],
    ids=str,
)
async def test_any_sets_of_ranks_give_the_image_of_degree_1(driver: Driver, alone: list[Result], plan: Plan) -> None:
    assert_same(await driver.carry(REQUESTS[0], plan, encode_rank=plan[0][0][0], decode_rank=plan[-1][0][-1]), alone[0])


@pytest.mark.parametrize("seed", range(15))
async def test_random_plans_of_interleaved_requests_give_the_images_of_degree_1(
    driver: Driver, alone: list[Result], seed: int
) -> None:
    rng = random.Random(seed)
    chosen = rng.choices(range(len(REQUESTS)), k=rng.randint(1, 3))
    results = await asyncio.gather(
        *(
            driver.carry(
                REQUESTS[index],
                random_plan(rng, REQUESTS[index].num_steps),
                encode_rank=rng.randrange(NUM_RANKS),
                decode_rank=rng.randrange(NUM_RANKS),
            )
            for index in chosen
        )
    )
    for index, result in zip(chosen, results, strict=True):
        assert_same(result, alone[index])


@pytest.mark.parametrize("ranks", [(2,), (1, 3)], ids=str)
async def test_requests_that_share_their_tasks_get_the_images_that_each_gets_alone(
    driver: Driver, alone: list[Result], ranks: Ranks
) -> None:
    chosen = (0, 1)  # of one kind, with five and six steps
    requests = [dataclasses.replace(REQUESTS[index], request_id=f"shared-{ranks[0]}-{index}") for index in chosen]
    names = tuple(request.request_id for request in requests)
    works = await driver.advance(Task(names, ENCODE, (0,)), *map(begun, requests))
    works = await driver.advance(Task(names, DENOISE, ranks, 3), *works)
    done, second = await driver.advance(Task(names, DENOISE, ranks, 2), *works)
    assert [work.stage_index for work in (done, second)] == [2, 1]
    (second,) = await driver.advance(Task(names[1:], DENOISE, ranks, 1), second)
    ended = await driver.advance(Task(names, DECODE, (1,)), done, second)
    for work, index in zip(ended, chosen, strict=True):
        assert len(driver.files(work.request.request_id)) == 3
        assert_same(driver.take(work), alone[index])


async def test_teams_at_work_side_by_side_do_not_disturb_each_other(driver: Driver, alone: list[Result]) -> None:
    pairs = [(ranks, tuple(sorted({0, 1, 2, 3} - set(ranks)))) for ranks in ((0, 1), (0, 2), (0, 3))]
    for pair in (*pairs, *pairs):
        results = await asyncio.gather(*(driver.carry(REQUESTS[2], [(ranks, 4)], ranks[0], ranks[0]) for ranks in pair))
        for result in results:
            assert_same(result, alone[2])


async def test_nothing_of_past_teams_piles_up_in_workers(driver: Driver) -> None:
    request = dataclasses.replace(REQUESTS[2], stages=image_stages(12))
    sets = [*itertools.combinations(range(NUM_RANKS), 2), *itertools.combinations(range(NUM_RANKS), 2)]

    def num_files() -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in driver.executor.pids.values()]

    await driver.carry(request, [(ranks, 1) for ranks in sets])
    before = num_files()
    await driver.carry(request, [(ranks, 1) for ranks in sets])
    await driver.carry(request, [(ranks, 1) for ranks in sets])
    assert len(list(driver.directory.glob("team-*"))) <= NUM_RANKS * MAX_GROUPS
    # 24 more teams of two ranks were at work: 12 more per rank.
    assert max(now - then for now, then in zip(num_files(), before, strict=True)) < 6


async def test_the_store_holds_nothing_of_a_forgotten_request_and_forgetting_again_is_no_error(driver: Driver) -> None:
    request = dataclasses.replace(REQUESTS[2], request_id="forgotten")
    other = dataclasses.replace(REQUESTS[2], request_id="forgotten-2")
    for asked in (request, other):
        (work,) = await driver.advance(Task((asked.request_id,), ENCODE, (0,)), begun(asked))
    driver.executor.forget("forgotten")
    driver.executor.forget("forgotten")
    assert driver.files("forgotten") == []
    assert driver.files("forgotten-2") == [f"{work.states[ENCODE].key}.safetensors"]
    driver.executor.forget("forgotten-2")


async def test_an_error_of_whoever_hears_of_a_task_is_not_taken_for_the_death_of_its_worker(driver: Driver) -> None:
    pids, loop = driver.executor.pids, asyncio.get_running_loop()
    raised: asyncio.Future[BaseException] = loop.create_future()

    def lose_a_file(event: Event) -> None:
        raise FileNotFoundError("not the pipe's fault")

    driver.executor.subscribe(lose_a_file)
    loop.set_exception_handler(lambda _, context: raised.set_result(context["exception"]))
    try:
        request = dataclasses.replace(REQUESTS[2], request_id="unheard")
        driver.executor.start_task(StartTask(10**6, Task(("unheard",), ENCODE, (0,)), (begun(request),)))
        assert isinstance(await asyncio.wait_for(raised, HANG_S), FileNotFoundError)
    finally:
        loop.set_exception_handler(None)
        driver.executor.subscribe(driver._on_event)
        driver.executor.forget("unheard")
    assert driver.executor.pids == pids
    assert driver.executor.ranks == {0, 1, 2, 3}
    await driver.run(Task(("unheard",), ENCODE, (0,)), begun(request))
    driver.executor.forget("unheard")


async def test_a_task_tells_how_long_a_processor_ran_its_thread(driver: Driver) -> None:
    request = dataclasses.replace(make_request("a red circle"), request_id="timed")
    encoded = await driver.run(Task((request.request_id,), ENCODE, (0,)), begun(request))
    driver.executor.forget(request.request_id)
    assert encoded.cpu_s is not None
    assert 0 < encoded.cpu_s < encoded.elapsed_s + 0.1


async def test_a_measured_profile_has_a_row_for_every_degree(driver: Driver, bundled_card: ModelCard) -> None:
    heard: list[tuple[int, int]] = []
    pool, shapes = PoolConfig(num_ranks=NUM_RANKS, degrees=(1, 2), max_batch=2), [Shape(256, 256)]
    try:
        profile = await measure(
            driver.executor,
            bundled_card,
            pool,
            shapes,
            lambda done, total, text: heard.append((done, total)),
            share=0.0,
        )
    finally:
        driver.executor.subscribe(driver._on_event)
    assert [(row.degree, row.batch, row.tokens, row.shape) for row in profile.rows_of(DENOISE)] == [
        (1, 1, 64, Shape(256, 256)),
        (1, 2, 64, Shape(256, 256)),
        (2, 1, 64, Shape(256, 256)),
    ]
    assert all(row.seconds > 0 and row.cv is not None and row.cv >= 0 for row in profile.rows_of(DENOISE))
    assert [(row.shape, row.seconds > 0) for row in profile.rows_of(DECODE)] == [(Shape(256, 256), True)]
    assert (profile.model, profile.fingerprint) == (bundled_card.name, bundled_card.fingerprint)
    assert [row.seconds > 0 for row in profile.rows_of(ENCODE)] == [True]
    assert profile.switch_s > 0
    assert 0 < profile.move_s < 0.1
    assert profile.team_s == 0
    assert heard == [(done, 5) for done in range(6)]
    assert list(driver.directory.glob("profile-*")) == []


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("faulty_flux:Unloadable", "RuntimeError: weights of another planet"),
        ("faulty_flux:Unreadable", "PermissionError: .*Permission denied: '/models/weights'"),
    ],
)
async def test_workers_that_cannot_load_end_the_start_with_one_line_that_says_why(
    bundled_card: ModelCard, adapter: str, message: str
) -> None:
    executor = LocalExecutor([bundled_card], PoolConfig(num_ranks=2), adapter=adapter)
    with pytest.raises(ConfigError, match=message) as caught:
        await executor.start(lambda text: None)
    assert "\n" not in str(caught.value)
    assert executor.pids == {}


async def test_a_replacement_refuses_a_directory_that_was_changed_since_the_server_started(
    bundled_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = shutil.copytree(bundled_dir, tmp_path / "model")
    executor = LocalExecutor([read_card(path)], PoolConfig(num_ranks=1))
    refused = asyncio.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "cannot start" in record.getMessage():
                refused.set()

    listener = Listener()
    logging.getLogger("tetriserve.executor").addHandler(listener)
    try:
        await executor.start(lambda text: None)
        file = path / "text_encoder_2/model.safetensors"
        save_file({f"base_model.model.{name}": tensor for name, tensor in load_file(file).items()}, file)
        os.kill(executor.pids[0], signal.SIGKILL)
        await asyncio.wait_for(refused.wait(), HANG_S)
        assert executor.ranks == frozenset()
    finally:
        logging.getLogger("tetriserve.executor").removeHandler(listener)
        await executor.stop()
    assert f"rank 0 cannot start: {path} was changed after the server started; restart the server" in caplog.messages
