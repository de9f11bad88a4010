"""Jobs without a journal: done once for each key, whoever waits, and kept in memory for a while."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.unit.test_live_engine import ObedientExecutor, running
from tests.waiting import HANG_S, until
from tetriserve.core.errors import KeyReused, QueueFull, RequestFailed, ShuttingDown
from tetriserve.core.events import FailureKind, StartTask, TaskFailed
from tetriserve.engine import GeneratedImage, Generation, Jobs
from tetriserve.journal import Key

KEY = Key("tenant", "k")
LIGHTHOUSE = [Generation(prompt="a lighthouse")]


class PatientExecutor(ObedientExecutor):
    """Starts no task while `gate` is clear, and fails all of them while there is a `failure`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: FailureKind | None = None
        self.started: list[StartTask] = []

    def start_task(self, command: StartTask) -> None:
        self.started.append(command)
        self.work = asyncio.create_task(self._run(command))

    async def _run(self, command: StartTask) -> None:
        await self.gate.wait()
        if self.failure is None:
            super().start_task(command)
        else:
            self._on_event(TaskFailed(command.task_id, self.failure, "it failed"))

    @property
    def num_requests(self) -> int:
        return len({command.work[0].request.request_id for command in self.started})


@pytest.fixture
async def executor() -> PatientExecutor:
    return PatientExecutor()


@pytest.fixture
async def jobs(executor: PatientExecutor) -> AsyncIterator[Jobs]:
    engine, _ = running(executor)
    jobs = Jobs(engine)
    yield jobs
    executor.gate.set()
    await jobs.stop()


async def test_callers_come_and_go_and_each_gets_the_same_images(jobs: Jobs, executor: PatientExecutor) -> None:
    executor.gate.clear()
    job = jobs.call(KEY, LIGHTHOUSE)
    leaving = asyncio.create_task(job.images())
    await until(lambda: executor.started)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert jobs.count() == {"open": 1}
    executor.gate.set()
    heard: list[object] = []
    (image,) = await asyncio.wait_for(job.images(lambda number, update: heard.append(update)), HANG_S)
    (again,) = await jobs.call(KEY, LIGHTHOUSE).images(lambda number, update: heard.append(update))
    assert again is image
    assert [update for update in heard if isinstance(update, GeneratedImage)] == [image, image]
    assert executor.num_requests == 1
    assert jobs.count() == {"finished": 1}
    with pytest.raises(KeyReused):
        jobs.call(KEY, [Generation(prompt="a ship")])


async def test_a_failure_of_the_request_is_its_answer_and_one_of_the_host_is_not(
    jobs: Jobs, executor: PatientExecutor
) -> None:
    executor.failure = FailureKind.STORE
    with pytest.raises(RequestFailed):
        await jobs.call(KEY, LIGHTHOUSE).images()
    assert jobs.count() == {"open": 1}
    executor.failure = FailureKind.STEP
    for _ in range(2):
        with pytest.raises(RequestFailed, match="it failed"):
            await jobs.call(KEY, LIGHTHOUSE).images()
    assert executor.num_requests == 2
    assert jobs.count() == {"failed": 1}


async def test_a_refusal_frees_the_key(jobs: Jobs) -> None:
    with pytest.raises(QueueFull):
        await jobs.call(KEY, LIGHTHOUSE * 10).images()
    assert not jobs.is_known(KEY)
    assert len(await jobs.call(KEY, LIGHTHOUSE).images()) == 1


async def test_an_answer_is_kept_for_as_long_as_it_was_said(executor: PatientExecutor) -> None:
    now = 1000.0
    engine, _ = running(executor)
    jobs = Jobs(engine, result_ttl_s=60.0, wall_clock=lambda: now)
    await jobs.call(KEY, LIGHTHOUSE).images()
    now += 60.0
    assert jobs.is_known(KEY)
    now += 1.0
    assert not jobs.is_known(KEY)
    await jobs.stop()


async def test_a_stop_ends_jobs_that_wait(executor: PatientExecutor) -> None:
    executor.gate.clear()
    engine, _ = running(executor)
    jobs = Jobs(engine)
    waiting = asyncio.create_task(jobs.call(KEY, LIGHTHOUSE).images())
    await until(lambda: executor.started)
    await asyncio.wait_for(jobs.stop(0.01), HANG_S)
    with pytest.raises(ShuttingDown):
        await waiting
    executor.work.cancel()
