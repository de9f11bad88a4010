"""The whole engine on real processes: many clients at once, clients who leave, workers that die, steps that fail."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.waiting import HANG_S, until
from tetriserve import Engine
from tetriserve.config import EngineConfig, ModelConfig, PoolConfig, SchedulingConfig
from tetriserve.control import Controller
from tetriserve.control.foresight import Foresight
from tetriserve.core.errors import (
    CheckpointError,
    ConfigError,
    DeadlineInfeasible,
    InvalidRequest,
    RequestFailed,
    ShuttingDown,
)
from tetriserve.core.events import Cancelled, Command, Event, FailureKind, StartTask
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.engine import GeneratedImage, Generation, Intake, LiveEngine, Observation, Occurred
from tetriserve.executor.local import LocalExecutor
from tetriserve.launch import StartProgress, launch
from tetriserve.models.card import ModelCard
from tetriserve.policies.registry import make_policy
from tetriserve.profile import Profile, ProfileCost
from tetriserve.workload.outcome import Outcome, Status

Paint = Callable[[Request], np.ndarray]

PIXEL_TOLERANCE = 1
HEARTBEAT_TIMEOUT_S = 4.0


class Recorder:
    """Stands before a controller and keeps what went in and what came out."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self.log: list[tuple[float, Event, list[Command]]] = []

    def handle(self, event: Event, now: float) -> list[Command]:
        commands = self._controller.handle(event, now)
        self.log.append((now, event, list(commands)))
        return commands

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)


@dataclass
class Setup:
    """A running engine and everything that was seen of it."""

    engine: LiveEngine
    executor: LocalExecutor
    recorder: Recorder
    outcomes: list[Outcome] = field(default_factory=list)
    events: list[tuple[float, Event]] = field(default_factory=list)

    @classmethod
    def of(cls, engine: LiveEngine, events: list[tuple[float, Event]]) -> Setup:
        recorder = Recorder(engine.controller)
        engine.controller = recorder  # type: ignore[assignment]
        assert isinstance(engine._executor, LocalExecutor)
        setup = cls(engine, engine._executor, recorder, events=events)
        engine.subscribe(setup.observe)
        return setup

    def observe(self, observation: Observation) -> None:
        if isinstance(observation, Outcome):
            self.outcomes.append(observation)

    @property
    def all_ranks(self) -> tuple[int, ...]:
        return tuple(range(self.executor._pool.num_ranks))

    def starts(self, request_id: str) -> list[StartTask]:
        """Every task that was started for a request."""
        commands = [command for _, _, commands in self.recorder.log for command in commands]
        return [c for c in commands if isinstance(c, StartTask) and request_id in c.task.members]

    def request_of(self, prompt: str) -> Request:
        """The latest request with this prompt that is not ended yet."""
        found = [t.request for t in self.engine.state.trajectories if t.request.prompt == prompt]
        return found[-1]

    async def until_idle(self) -> None:
        """Nothing waits, nothing runs, every rank is up, and nothing of any request is left in the store."""
        state = self.engine.state
        await until(lambda: len(self.engine.state.ranks) == len(self.all_ranks) and not self.engine.state.in_flight)
        state = self.engine.state
        assert (state.trajectories, state.in_flight, state.ranks) == ((), (), self.all_ranks)
        assert self.engine.is_ready
        left = [path.name for path in self.executor._directory.path.iterdir()]
        assert [name for name in left if not name.startswith(("lock", "team-", ".preview-basis"))] == []


@asynccontextmanager
async def faulty_engine(card: ModelCard, profile: Profile, num_ranks: int, policy_name: str) -> AsyncIterator[Setup]:
    """As `launch` puts it together, with the adapter that fails to order, and little patience with silent workers."""
    pool = PoolConfig(num_ranks=num_ranks, heartbeat_timeout_s=HEARTBEAT_TIMEOUT_S)
    executor = LocalExecutor([card], pool, adapter="faulty_flux:FaultyFlux")
    await executor.start(lambda text: None)
    cost = ProfileCost(profile, lambda shape: card.valid_degrees(pool.degrees))
    new_policy = partial(make_policy, policy_name, cost, num_ranks=num_ranks, shapes=profile.shapes)
    engine = LiveEngine(
        Controller(new_policy(), cost),
        executor,
        [Intake(card=card, cost=cost)],
        Foresight(new_policy),
        max_queue=256,
        policy_name="test",
    )
    engine.start()
    try:
        yield Setup.of(engine, [])
    finally:
        await engine.stop()


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
async def setup(request: pytest.FixtureRequest, bundled_dir: Path, profile_path: str) -> AsyncIterator[Setup]:
    """An engine as `serve` launches it, under the policy of the paper."""
    events: list[tuple[float, Event]] = []
    config = EngineConfig(
        models=(ModelConfig(path=str(bundled_dir), profile=profile_path),),
        pool=PoolConfig(num_ranks=request.param, heartbeat_timeout_s=HANG_S),
    )

    def observe(observation: Observation) -> None:
        if isinstance(observation, Occurred):
            events.append((observation.now, observation.event))

    engine = (await launch(config, StartProgress(), observer=observe)).engine
    yield Setup.of(engine, events)
    await engine.stop()


@pytest.fixture(scope="module")
async def four(bundled_card: ModelCard, profile: Profile) -> AsyncIterator[Setup]:
    """Two groups of two ranks, each for one request at a time."""
    async with faulty_engine(bundled_card, profile, 4, "fixed:2") as setup:
        yield setup


@pytest.fixture(scope="module")
async def two(bundled_card: ModelCard, profile: Profile) -> AsyncIterator[Setup]:
    """One group of two ranks."""
    async with faulty_engine(bundled_card, profile, 2, "fixed:2") as setup:
        yield setup


@pytest.fixture(scope="module")
def expected(paint: Paint) -> Callable[[Request], np.ndarray]:
    """Each request's image as computed alone, kept by what it depends on."""
    known: dict[tuple[object, ...], np.ndarray] = {}

    def expected(request: Request) -> np.ndarray:
        key = (request.prompt, request.seed, request.shape, request.num_steps)
        if key not in known:
            known[key] = paint(request)
        return known[key]

    return expected


def distance(pixels: np.ndarray, other: np.ndarray) -> int:
    assert pixels.shape == other.shape
    return int(np.abs(pixels.astype(int) - other).max())


async def assert_right(images: Sequence[GeneratedImage], expected: Callable[[Request], np.ndarray]) -> None:
    for image in images:
        alone = await asyncio.to_thread(expected, image.outcome.request)
        assert distance(image.pixels, alone) <= PIXEL_TOLERANCE
        assert image.outcome.status is Status.FINISHED


def assert_one_task_at_a_time(outcomes: Sequence[Outcome]) -> None:
    intervals = defaultdict(list)
    for outcome in outcomes:
        for run in outcome.runs:
            for rank in run.task.ranks:
                intervals[rank].append((run.start_s, run.end_s))
    assert intervals
    for spans in intervals.values():
        spans.sort()
        assert all(end_s <= start_s for (_, end_s), (start_s, _) in zip(spans, spans[1:], strict=False))


def assert_every_step_once(outcome: Outcome) -> None:
    stages = [run.task.stage for run in outcome.runs]
    assert stages == [ENCODE, *[DENOISE] * (len(stages) - 2), DECODE]
    assert len(outcome.degrees) == outcome.request.num_steps


def mixed(count: int) -> list[Generation]:
    """Each with a prompt and a seed of its own; mostly small."""
    sizes = ["256x256"] * 5 + ["512x512", "256x256", "256x288"]
    return [
        Generation(
            prompt=f"picture number {number}",
            seed=1000 + number,
            size=sizes[number % 8],
            num_steps=1 + number % 2 if sizes[number % 8] == "512x512" else 2 + number % 2,
            slo_s=2.0 + number % 5 * 4.0,
            priority=number % 3 % 2,
        )
        for number in range(count)
    ]


async def test_64_clients_at_once_each_get_the_image_of_their_own_prompt_and_seed(
    setup: Setup, expected: Callable[[Request], np.ndarray]
) -> None:
    asked = mixed(64)
    images = await asyncio.gather(*(setup.engine.generate(generation) for generation in asked))
    await assert_right(images, expected)
    outcomes = [image.outcome for image in images]
    for generation, outcome in zip(asked, outcomes, strict=True):
        request = outcome.request
        assert (request.prompt, request.seed) == (generation.prompt, generation.seed)
        assert (str(request.shape), request.num_steps) == (generation.size, generation.num_steps)
        assert_every_step_once(outcome)
    for image in images:
        rivals = [other.outcome.request for other in images if other.pixels.shape == image.pixels.shape]
        nearest = min(rivals, key=lambda rival: np.abs(image.pixels.astype(int) - expected(rival)).mean())
        assert nearest == image.outcome.request
    assert_one_task_at_a_time(outcomes)
    assert {rank for outcome in outcomes for run in outcome.runs for rank in run.task.ranks} == set(setup.all_ranks)
    assert len({outcome.request.request_id for outcome in setup.outcomes}) == len(setup.outcomes) >= 64
    assert setup.executor.num_restarts == 0
    await setup.until_idle()


async def test_a_client_who_leaves_frees_its_ranks_within_a_task_and_disturbs_nobody(
    setup: Setup, expected: Callable[[Request], np.ndarray]
) -> None:
    staying = [
        asyncio.create_task(setup.engine.generate(Generation(prompt=f"stays {n}", size="256x256", num_steps=6, seed=n)))
        for n in range(5)
    ]
    leaver = asyncio.create_task(
        setup.engine.generate(Generation(prompt="leaves", size="256x256", num_steps=200, seed=9, slo_s=9.0))
    )
    await until(lambda: any(t.request.prompt == "leaves" and t.steps_done > 0 for t in setup.engine.state.trajectories))
    request = setup.request_of("leaves")
    await until(lambda: any(f.task.members[0] == request.request_id for f in setup.engine.state.in_flight))
    leaver.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaver
    assert request not in [trajectory.request for trajectory in setup.engine.state.trajectories]

    await assert_right(await asyncio.gather(*staying), expected)
    await setup.until_idle()
    log = [(event, commands) for _, event, commands in setup.recorder.log]
    cancelled_at = next(i for i, (event, _) in enumerate(log) if event == Cancelled(request.request_id))
    later = [command for _, commands in log[cancelled_at:] for command in commands]
    assert not [c for c in later if isinstance(c, StartTask) and request.request_id in c.task.members]
    assert [o.status for o in setup.outcomes if o.request == request] == [Status.CANCELLED]


async def test_a_client_who_leaves_before_anything_ran_leaves_nothing(setup: Setup) -> None:
    generations = [Generation(prompt=f"never mind {number}", size="512x512") for number in range(12)]
    clients = [asyncio.create_task(setup.engine.generate(generation)) for generation in generations]
    await until(lambda: len(setup.engine.state.trajectories) == 12)
    for client in clients:
        client.cancel()
    assert [type(error) for error in await asyncio.gather(*clients, return_exceptions=True)] == (
        [asyncio.CancelledError] * 12
    )
    await setup.until_idle()


async def test_a_deadline_that_cannot_be_met_is_refused_when_the_client_wants_that(setup: Setup) -> None:
    with pytest.raises(DeadlineInfeasible) as caught:
        await setup.engine.generate(Generation(prompt="at once", slo_s=0.001, reject_infeasible=True))
    assert caught.value.earliest_deadline_s > caught.value.retry_after_s > 0
    await setup.until_idle()


async def test_the_event_log_replayed_through_a_new_controller_gives_the_same_commands(
    setup: Setup, bundled_card: ModelCard, profile: Profile
) -> None:
    await asyncio.gather(*(setup.engine.generate(generation) for generation in mixed(6)))
    await setup.until_idle()
    log = setup.recorder.log
    assert [(now, event) for now, event, _ in log] == setup.events[-len(log) :]
    joined = len(setup.events) - len(log)
    assert joined == len(setup.all_ranks)
    degrees = PoolConfig(num_ranks=len(setup.all_ranks)).degrees
    cost = ProfileCost(profile, lambda shape: bundled_card.valid_degrees(degrees))
    policy = make_policy("lookahead", cost, num_ranks=len(setup.all_ranks), shapes=profile.shapes)
    again = Controller(policy, cost)
    commands = [again.handle(event, now) for now, event in setup.events]
    assert commands == [[]] * joined + [live for _, _, live in log]
    assert sum(isinstance(command, StartTask) for answer in commands for command in answer) > 6 * 3


async def disturb(
    setup: Setup, signal_number: signal.Signals, stage: str, member: int, prompt: str
) -> tuple[GeneratedImage, StartTask]:
    """The image of a request whose worker is struck in the middle of `stage`, and the task that was struck."""
    engine = setup.engine
    client = asyncio.create_task(engine.generate(Generation(prompt=prompt, size="256x256", num_steps=24, seed=3)))
    min_steps = {ENCODE: 0, DENOISE: 1, DECODE: 24}[stage]

    def is_there() -> bool:
        return any(f.task.stage == stage for f in engine.state.in_flight) and any(
            t.request.prompt == prompt and t.steps_done >= min_steps for t in engine.state.trajectories
        )

    await until(is_there)
    await asyncio.sleep(0.02)
    flight = next(flight for flight in engine.state.in_flight if flight.task.stage == stage)
    pids = setup.executor.pids
    victim = flight.task.ranks[member]
    os.kill(pids[victim], signal_number)
    image = await client
    await setup.until_idle()
    replaced = {rank for rank, pid in setup.executor.pids.items() if pid != pids[rank]}
    assert replaced == {victim}
    struck = next(s for s in setup.starts(image.outcome.request.request_id) if s.task_id == flight.task_id)
    return image, struck


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize(("stage", "member"), [(ENCODE, 0), (DENOISE, 0), (DENOISE, 1), (DECODE, 0)])
async def test_an_image_survives_the_death_or_the_hang_of_a_worker(
    two: Setup, expected: Callable[[Request], np.ndarray], signal_number: signal.Signals, stage: str, member: int
) -> None:
    image, struck = await disturb(two, signal_number, stage, member, f"[slow] struck in {stage}")
    await assert_right([image], expected)
    assert_every_step_once(image.outcome)
    assert struck.task.degree == (2 if stage is DENOISE else 1)
    starts = two.starts(image.outcome.request.request_id)
    retry = starts[starts.index(struck) + 1]
    assert (retry.task.stage, retry.work) == (stage, struck.work)


async def test_with_one_rank_everything_waits_for_the_replacement(
    bundled_card: ModelCard, profile: Profile, expected: Callable[[Request], np.ndarray]
) -> None:
    async with faulty_engine(bundled_card, profile, 1, "tetriserve") as one:
        generations = [Generation(prompt=f"[slow] patient {n}", size="256x256", num_steps=4, seed=n) for n in range(3)]
        clients = [asyncio.create_task(one.engine.generate(generation)) for generation in generations]
        await until(lambda: any(flight.task.stage == DENOISE for flight in one.engine.state.in_flight))
        os.kill(one.executor.pids[0], signal.SIGKILL)
        await until(lambda: one.engine.state.ranks == ())
        assert not one.engine.is_ready
        late = asyncio.create_task(one.engine.generate(Generation(prompt="comes late", size="256x256", num_steps=2)))
        await assert_right(await asyncio.gather(*clients, late), expected)
        assert one.executor.num_restarts == 1
        await one.until_idle()


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("[runtime]", "denoise failed: RuntimeError: expected 3 dimensions, got 4"),
        ("[nan]", "denoise failed: NonFinite: latents are not finite after step"),
    ],
)
async def test_a_step_that_fails_on_one_rank_of_two_fails_its_request_alone_and_its_ranks_work_on(
    four: Setup, expected: Callable[[Request], np.ndarray], mark: str, message: str
) -> None:
    pids = four.executor.pids
    good = [
        asyncio.create_task(four.engine.generate(Generation(prompt=f"good {n}", size="256x256", num_steps=8, seed=n)))
        for n in range(3)
    ]
    with pytest.raises(RequestFailed) as caught:
        await four.engine.generate(Generation(prompt=f"{mark} bad", size="256x256", num_steps=5))
    assert str(caught.value).startswith(message)
    await assert_right(await asyncio.gather(*good), expected)
    (failed,) = [outcome for outcome in four.outcomes if outcome.request.prompt == f"{mark} bad"]
    assert (failed.status, failed.message) == (Status.FAILED, str(caught.value))
    *_, struck = four.starts(failed.request.request_id)
    assert (struck.task.stage, struck.task.degree) == (DENOISE, 2)

    after = await asyncio.gather(
        *(four.engine.generate(Generation(prompt=f"after {n}", size="256x256", num_steps=3, seed=n)) for n in range(4))
    )
    await assert_right(after, expected)
    assert struck.task.ranks in {ranks for image in after for ranks in image.outcome.ranks}
    assert four.executor.pids == pids
    await four.until_idle()


async def test_of_images_asked_for_together_one_that_fails_takes_the_others_with_it(four: Setup) -> None:
    prompts = ["[slow] together 1", "[runtime] together 2", "[slow] together 3"]
    with pytest.raises(RequestFailed, match="expected 3 dimensions, got 4"):
        await four.engine.generate_all([Generation(prompt=p, size="256x256", num_steps=50) for p in prompts])
    await four.until_idle()
    status = {o.request.prompt: o.status for o in four.outcomes if "together" in o.request.prompt}
    assert [status[prompt] for prompt in prompts] == [Status.CANCELLED, Status.FAILED, Status.CANCELLED]


async def test_a_request_that_kills_its_worker_every_time_is_failed_alone_after_a_few_times(
    four: Setup, expected: Callable[[Request], np.ndarray]
) -> None:
    before = four.executor.num_restarts
    good = [
        asyncio.create_task(four.engine.generate(Generation(prompt=f"brave {n}", size="256x256", num_steps=8, seed=n)))
        for n in range(4)
    ]
    with pytest.raises(
        RequestFailed, match=r"its workers were lost 6 times in a row, last: rank \d was lost: its process ended"
    ):
        await four.engine.generate(Generation(prompt="[kill] deadly", size="256x256", num_steps=5))
    await assert_right(await asyncio.gather(*good), expected)
    await four.until_idle()
    assert four.executor.num_restarts == before + 6


async def test_a_full_store_costs_the_request_alone_and_no_worker(
    four: Setup, expected: Callable[[Request], np.ndarray]
) -> None:
    pids, before = four.executor.pids, four.executor.num_restarts
    store = str(four.executor._directory.path)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", store]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        with pytest.raises(RequestFailed, match="StoreError: .* the tensor store is full") as caught:
            await four.engine.generate(Generation(prompt="too much", size="256x256", num_steps=3))
    finally:
        subprocess.run(["umount", "--lazy", store], check=True)
    assert caught.value.kind is FailureKind.STORE
    image = await four.engine.generate(Generation(prompt="enough", size="256x256", num_steps=3, seed=1))
    await assert_right([image], expected)
    await four.until_idle()
    assert (four.executor.pids, four.executor.num_restarts) == (pids, before)


async def test_a_store_that_is_removed_is_made_again(four: Setup, expected: Callable[[Request], np.ndarray]) -> None:
    pids, before = four.executor.pids, four.executor.num_restarts
    client = asyncio.create_task(four.engine.generate(Generation(prompt="[slow] gone", size="256x256", num_steps=50)))
    await until(lambda: any(flight.task.stage == DENOISE for flight in four.engine.state.in_flight))
    shutil.rmtree(four.executor._directory.path)
    (ended,) = await asyncio.gather(client, return_exceptions=True)
    if isinstance(ended, RequestFailed):  # else its state was still with the ranks that went on with it
        assert ended.kind is FailureKind.STORE
    image = await four.engine.generate(Generation(prompt="there", size="256x256", num_steps=3, seed=1))
    await assert_right([image], expected)
    await four.until_idle()
    assert (four.executor.pids, four.executor.num_restarts) == (pids, before)


async def test_the_operator_says_how_many_workers_a_request_may_lose(bundled_dir: Path, profile_path: str) -> None:
    config = EngineConfig(
        models=(ModelConfig(path=str(bundled_dir), profile=profile_path),),
        pool=PoolConfig(num_ranks=1),
        scheduling=SchedulingConfig(max_losses=0),
    )
    one = Setup.of((await launch(config, StartProgress())).engine, [])
    try:
        client = asyncio.create_task(one.engine.generate(Generation(prompt="fragile", size="256x256", num_steps=200)))
        await until(lambda: any(flight.task.stage == DENOISE for flight in one.engine.state.in_flight))
        os.kill(one.executor.pids[0], signal.SIGKILL)
        with pytest.raises(RequestFailed, match="its workers were lost 1 times in a row"):
            await client
    finally:
        await one.engine.stop()


async def test_a_request_that_no_rank_has_the_memory_for_is_failed_alone_and_the_reason_named(
    four: Setup, expected: Callable[[Request], np.ndarray]
) -> None:
    before, pids = four.executor.num_restarts, four.executor.pids
    good = [
        asyncio.create_task(four.engine.generate(Generation(prompt=f"lean {n}", size="256x256", num_steps=8, seed=n)))
        for n in range(4)
    ]
    with pytest.raises(RequestFailed) as caught:
        await four.engine.generate(Generation(prompt="[memory] huge", size="256x256", num_steps=5))
    assert str(caught.value) == (
        "its workers were lost 6 times in a row, last: a rank ran out of memory: "
        "denoise failed: MemoryError: no room for another tensor"
    )
    await assert_right(await asyncio.gather(*good), expected)
    await four.until_idle()
    assert four.executor.num_restarts == before + 6
    assert four.executor.pids != pids


async def test_a_drained_engine_refuses_newcomers_and_finishes_what_it_took(
    bundled_card: ModelCard, profile: Profile, expected: Callable[[Request], np.ndarray]
) -> None:
    async with faulty_engine(bundled_card, profile, 1, "fcfs") as one:
        taken = asyncio.create_task(one.engine.generate(Generation(prompt="taken", size="256x256", num_steps=3)))
        await until(lambda: bool(one.engine.state.in_flight))
        stopping = asyncio.create_task(one.engine.stop(HANG_S))
        await asyncio.sleep(0)
        assert not one.engine.is_ready
        with pytest.raises(ShuttingDown):
            await one.engine.generate(Generation(prompt="too late"))
        await assert_right([await taken], expected)
        await stopping
        assert one.executor.pids == {}


async def test_what_a_stop_does_not_wait_for_ends_with_an_error(bundled_card: ModelCard, profile: Profile) -> None:
    async with faulty_engine(bundled_card, profile, 1, "tetriserve") as one:
        clients = [
            asyncio.create_task(one.engine.generate(Generation(prompt=f"[slow] {n}", size="256x256", num_steps=100)))
            for n in range(3)
        ]
        await until(lambda: bool(one.engine.state.in_flight) and len(one.engine.state.trajectories) == 3)
        await one.engine.stop()
        errors = await asyncio.gather(*clients, return_exceptions=True)
        assert [type(error) for error in errors] == [ShuttingDown] * 3
        assert "shut down before the image was finished" in str(errors[0])
        num_events = len(one.recorder.log)
        await asyncio.sleep(2.0)  # longer than a round
        assert len(one.recorder.log) == num_events, "a stopped engine does nothing any more"


@pytest.fixture(scope="module")
def python_engine(bundled_dir: Path, profile_path: str) -> Iterator[Engine]:
    with Engine(str(bundled_dir), ranks=2, profile=profile_path) as engine:
        yield engine


OPTIONS: dict[str, Any] = {"size": "256x256", "num_steps": 2}


def test_an_engine_answers_with_a_picture_and_what_happened(
    python_engine: Engine, expected: Callable[[Request], np.ndarray]
) -> None:
    picture = python_engine.generate("a boat", seed=5, slo_s=30.0, **OPTIONS)
    request = picture.outcome.request
    assert (request.prompt, request.seed, request.shape, request.num_steps) == ("a boat", 5, Shape(256, 256), 2)
    assert request.deadline_s == pytest.approx(request.arrival_s + 30.0)
    assert (picture.image.mode, picture.image.size) == ("RGB", (256, 256))
    assert distance(np.asarray(picture.image), expected(request)) <= PIXEL_TOLERANCE
    assert picture.outcome.is_attained
    assert len(picture.outcome.degrees) == 2


def test_an_engine_serves_several_threads_and_any_event_loop_at_once(
    python_engine: Engine, expected: Callable[[Request], np.ndarray]
) -> None:
    pictures: dict[int, Any] = {}

    def ask(number: int) -> None:
        pictures[number] = python_engine.generate(f"thread {number}", seed=number, **OPTIONS)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()

    async def ask_all() -> list[Any]:
        return await asyncio.gather(*(python_engine.generate_async(f"loop {n}", seed=n, **OPTIONS) for n in range(3)))

    pictures |= dict(enumerate(asyncio.run(ask_all()), start=4))
    for thread in threads:
        thread.join()
    prompts = [pictures[number].outcome.request.prompt for number in range(7)]
    assert prompts == [f"thread {n}" for n in range(4)] + [f"loop {n}" for n in range(3)]
    for picture in pictures.values():
        assert distance(np.asarray(picture.image), expected(picture.outcome.request)) <= PIXEL_TOLERANCE


def test_errors_of_a_request_reach_the_caller_and_the_engine_goes_on(python_engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="size .* is not of the form") as caught:
        python_engine.generate("a circle", size="big")
    assert caught.value.param == "size"
    with pytest.raises(DeadlineInfeasible):
        python_engine.generate("at once", slo_s=0.001, reject_infeasible=True)
    with pytest.raises(TypeError, match="steps"):
        python_engine.generate("misspelt", steps=3)
    assert python_engine.generate("goes on", **OPTIONS).image.size == (256, 256)


def test_cancelling_the_async_call_cancels_the_request(python_engine: Engine) -> None:
    live = python_engine._live
    assert live is not None

    async def leave() -> None:
        call = asyncio.create_task(python_engine.generate_async("never mind", size="512x512", num_steps=200))
        await until(lambda: bool(live.state.in_flight))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: not live.state.in_flight and not live.state.trajectories)

    asyncio.run(leave())


async def test_an_engine_can_be_entered_and_left_on_an_event_loop(bundled_dir: Path, profile_path: str) -> None:
    async with Engine(str(bundled_dir), ranks=1, profile=profile_path, policy="fcfs") as engine:
        picture = await engine.generate_async("a boat", **OPTIONS)
        assert picture.outcome.degrees == (1, 1)
    with pytest.raises(RuntimeError, match="not running; use it inside `with"):
        await engine.generate_async("too late")


def test_threads_that_ask_while_an_engine_is_left_are_answered(bundled_dir: Path, profile_path: str) -> None:
    ends: list[str] = []

    def ask() -> None:
        while True:
            try:
                engine.generate("again", **OPTIONS)
            except Exception as error:
                ends.append(type(error).__name__)
                if isinstance(error, RuntimeError):  # the engine is gone
                    return

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(8)]
    with Engine(str(bundled_dir), ranks=1, profile=profile_path, policy="fcfs") as engine:
        for thread in threads:
            thread.start()
        engine.generate("first", **OPTIONS)
    for thread in threads:
        thread.join(HANG_S)
    assert not any(thread.is_alive() for thread in threads)
    assert "ShuttingDown" in ends
    assert ends.count("RuntimeError") == 8
    assert set(ends) <= {"ShuttingDown", "RuntimeError", "CancelledError"}


class Interrupted(Engine):
    """Somebody presses Ctrl-C as soon as its workers are there."""

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        before = len(multiprocessing.active_children())
        asyncio.run_coroutine_threadsafe(coroutine, self._running_loop)
        while len(multiprocessing.active_children()) < before + 2:
            time.sleep(0.01)
        raise KeyboardInterrupt


def test_an_engine_whose_start_is_interrupted_leaves_no_worker_and_no_thread(
    bundled_dir: Path, profile_path: str
) -> None:
    children, threads = set(multiprocessing.active_children()), set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt), Interrupted(str(bundled_dir), ranks=2, profile=profile_path):
        pass
    assert set(multiprocessing.active_children()) <= children
    left = set(threading.enumerate()) - threads
    assert {thread.name for thread in left} <= {"tetriserve-starts"}, "that one lives as long as the process"


@pytest.mark.filterwarnings("error")
def test_an_engine_that_was_not_entered_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"the engine is not running; use it inside `with Engine\(...\) as engine:`"):
        Engine().generate("too early")


def test_an_engine_that_cannot_start_raises_why_and_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(CheckpointError, match="is not a directory"), Engine(str(tmp_path / "no")):
        pass
    assert threading.active_count() == before


async def test_a_policy_that_does_not_exist_is_refused_before_any_worker_starts(
    bundled_dir: Path, profile_path: str
) -> None:
    steps: list[str] = []
    scheduling = SchedulingConfig(policy="guesswork")
    config = EngineConfig(models=(ModelConfig(path=str(bundled_dir), profile=profile_path),), scheduling=scheduling)
    with pytest.raises(ConfigError, match="unknown policy 'guesswork'; choose one of: tetriserve"):
        await launch(config, StartProgress(step=steps.append))
    assert steps == []
