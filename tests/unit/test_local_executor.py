"""Supervision, with workers played by the test: what happens when one dies, hangs or errs at an awkward moment."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import multiprocessing
import os
import pickle
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.waiting import HANG_S
from tetriserve.config import PoolConfig
from tetriserve.core.errors import RequestFailed
from tetriserve.core.events import (
    Event,
    FailureKind,
    Output,
    Result,
    StartTask,
    TaskFailed,
    TaskFinished,
    TensorRef,
    TextCount,
    Work,
    WorkerJoined,
    WorkerLost,
)
from tetriserve.core.execution import Execution
from tetriserve.core.memory import Component, RankMemory
from tetriserve.core.messages import (
    Forget,
    FromWorker,
    Heartbeat,
    Ready,
    RunTask,
    TaskDone,
    TaskError,
)
from tetriserve.core.plan import Task
from tetriserve.core.request import RAW_PIXELS, Request, Shape
from tetriserve.core.stages import DENOISE, ENCODE, image_stages
from tetriserve.engine.outputs import read_output
from tetriserve.executor.inbox import Garbled, Inbox
from tetriserve.executor.local import LocalExecutor, restart_delay_s
from tetriserve.models.card import ModelCard
from tetriserve.workload.outcome import Outcome, Status

CARD = ModelCard(
    name="tiny", path=Path("tiny"), family="flux", pipeline_class="FluxPipeline",
    execution=Execution("float32"), size_multiple=32,
    pixels_per_token=32, num_heads=8, num_text_tokens=64, default_num_steps=20, default_guidance_scale=3.5,
    has_guidance=True, has_negative_prompt=True, sizes=(Shape(256, 256),), fingerprint="abc",
)  # fmt: skip
REQUEST = Request(
    request_id="a", prompt="a", shape=Shape(256, 256), stages=image_stages(9), seed=0, arrival_s=0.0, deadline_s=9.0
)
RESULT = Result(TensorRef("a.denoise.1.1", 1), 1, is_stage_over=False)
OUTCOME = Outcome(request=REQUEST, status=Status.FINISHED, runs=(), predicted_finish_s=1.0, finish_s=1.0)


class PlayedWorker:
    """A worker's process and its end of the pipe, in the hands of the test."""

    def __init__(self, connection: Connection, lifeline: Connection) -> None:
        self.connection = connection
        self.lifeline = lifeline
        self.exitcode: int | None = None
        self.pid = 0
        self.unread: list[Any] = []

    def start(self) -> None:
        time.sleep(0.02)

    def join(self, timeout: float | None = None) -> None:
        pass

    def is_alive(self) -> bool:
        return not self.connection.closed

    def kill(self) -> None:
        self.exitcode = -9
        self.lifeline.close()
        self.connection.close()

    def say(self, *messages: object) -> None:
        for message in messages:
            self.connection.send(message)

    def heard(self) -> list[Any]:
        """What was sent to it since it was last asked."""
        messages, self.unread = self.unread, []
        while not self.connection.closed and self.connection.poll():
            messages.append(self.connection.recv())
        return messages


class PlayedContext:
    """A multiprocessing context whose processes are the test's."""

    def __init__(self, born: Callable[[int, PlayedWorker], None]) -> None:
        self._born = born

    def Pipe(self, duplex: bool = True) -> tuple[Connection, Connection]:  # noqa: N802
        return multiprocessing.Pipe(duplex)

    def Process(self, *, args: tuple[Any, Connection, Connection], **_: object) -> PlayedWorker:  # noqa: N802
        spec, theirs, held = args
        worker = PlayedWorker(Connection(os.dup(theirs.fileno())), Connection(os.dup(held.fileno()), readable=False))
        worker.spec = spec
        self._born(spec.rank, worker)
        return worker


class Pool:
    """An executor and the present worker of each rank."""

    def __init__(self, num_ranks: int, on_birth: Callable[[int, PlayedWorker], None], **settings: float) -> None:
        pool = PoolConfig(num_ranks=num_ranks, **settings)  # type: ignore[arg-type]
        self.executor = LocalExecutor([CARD], pool)
        self.workers: dict[int, PlayedWorker] = {}
        self.events: list[Event] = []
        self._on_birth = on_birth
        self.executor._starter.context = PlayedContext(self._born)  # type: ignore[assignment]
        self.executor.subscribe(self.events.append)

    def _born(self, rank: int, worker: PlayedWorker) -> None:
        self.workers[rank] = worker
        self._on_birth(rank, worker)

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(HANG_S):
            while not is_so():
                await asyncio.sleep(0.001)

    def start_task(self, task_id: int, ranks: tuple[int, ...]) -> None:
        work = Work(REQUEST, 1, 0, {ENCODE: TensorRef("a.encode.0.0", 1)})
        self.executor.start_task(StartTask(task_id, Task(("a",), DENOISE, ranks, 1), (work,)))


def ready(rank: int, worker: PlayedWorker) -> None:
    worker.say(Ready())


@pytest.fixture
async def pools() -> AsyncIterator[Callable[..., Pool]]:
    made: list[Pool] = []

    def make(num_ranks: int, on_birth: Callable[[int, PlayedWorker], None] = ready, **settings: float) -> Pool:
        made.append(Pool(num_ranks, on_birth, **settings))
        return made[-1]

    yield make
    for pool in made:
        for worker in pool.workers.values():
            worker.kill()
        await pool.executor.stop()


async def started(pool: Pool) -> Pool:
    await asyncio.wait_for(pool.executor.start(lambda text: None), HANG_S)
    return pool


async def test_a_worker_that_reads_nothing_does_not_stop_the_event_loop(pools: Callable[..., Pool]) -> None:
    pool = await started(pools(1))
    for number in range(2000):  # a socket's buffer holds about 280
        pool.executor.forget(f"request-{number}")
    pool.start_task(1, (0,))
    heard: list[Any] = []

    def read() -> bool:
        heard.extend(pool.workers[0].heard())
        return len(heard) == 2001

    await pool.until(read)
    assert heard[:-1] == [Forget(f"request-{number}") for number in range(2000)]
    assert isinstance(heard[-1], RunTask)


async def test_the_leader_is_told_of_a_task_last(pools: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The others may have to read the state that the leader has, and do so while it is told."""
    pool = await started(pools(3))
    told: list[int] = []
    for rank, worker in pool.executor._workers.items():
        monkeypatch.setattr(worker.outbox, "send", lambda message, rank=rank: told.append(rank))
    pool.start_task(1, (1, 2, 0))
    assert told == [0, 2, 1]


async def test_what_waited_for_a_dead_worker_does_not_reach_its_replacement(pools: Callable[..., Pool]) -> None:
    pool = await started(pools(1))
    first = pool.workers[0]
    for number in range(1000):
        pool.executor.forget(f"request-{number}")
    first.kill()
    await pool.until(lambda: pool.workers[0] is not first and pool.executor.ranks == {0})
    pool.start_task(1, (0,))
    await asyncio.sleep(0.05)
    assert [type(message) for message in pool.workers[0].heard()] == [RunTask]
    pool.workers[0].say(TaskDone(1, 0.5, (RESULT,)))
    await pool.until(lambda: TaskFinished(1, 0.5, (RESULT,)) in pool.events)


async def test_a_worker_that_dies_right_after_it_was_ready_does_not_hang_the_start(pools: Callable[..., Pool]) -> None:
    def only_rank_0(rank: int, worker: PlayedWorker) -> None:
        if rank == 0:
            worker.say(Ready())

    pool = pools(2, only_rank_0)
    starting = asyncio.create_task(started(pool))
    await pool.until(lambda: pool.executor.ranks == {0} and 1 in pool.executor.pids)
    first = pool.workers[1]
    first.say(Ready())
    first.kill()
    await asyncio.wait_for(starting, HANG_S)
    await pool.until(lambda: pool.workers[1] is not first)
    pool.workers[1].say(Ready())
    await pool.until(lambda: pool.executor.ranks == {0, 1})
    assert pool.executor.num_restarts == 1


async def test_what_ranks_hold_is_known_while_they_are_up_and_logged_by_role_at_the_start(
    pools: Callable[..., Pool], caplog: pytest.LogCaptureFixture
) -> None:
    parts = (Component("transformer", 3_000_000_000), Component("vae", 1500))

    def holding(rank: int, worker: PlayedWorker) -> None:
        worker.say(
            Ready((), RankMemory((*parts, Component("text_encoder", 9_000_000)) if rank == 0 else parts, 8 + rank))
        )

    with caplog.at_level("INFO"):
        pool = await started(pools(3, holding))
    assert [record.getMessage() for record in caplog.records if "hold" in record.getMessage()] == [
        "rank 0 holds 3.0 GB: transformer 3.0 GB, vae 1.5 kB, text_encoder 9.0 MB",
        "ranks 1,2 hold 3.0 GB each: transformer 3.0 GB, vae 1.5 kB",
    ]
    assert {rank: held.resident_bytes for rank, held in pool.executor.memory.items()} == {0: 8, 1: 9, 2: 10}
    first = pool.workers[1]
    first.kill()
    await pool.until(lambda: 1 not in pool.executor.memory)
    await pool.until(lambda: 1 in pool.executor.memory)


async def test_workers_are_told_which_stages_they_run_and_their_replacements_the_same(
    pools: Callable[..., Pool],
) -> None:
    pool = await started(pools(3, encoder_ranks=1))
    born = dict(pool.workers)
    assert [[*map(worker.spec.has_text_encoders, worker.spec.cards)] for worker in (born[0], born[1], born[2])] == [
        [True], [False], [False]
    ]  # fmt: skip
    assert [[*map(born[rank].spec.lacks, born[rank].spec.cards)] for rank in range(3)] == [
        [frozenset()], [{ENCODE}], [{ENCODE}]
    ]  # fmt: skip
    for rank in (0, 1):
        born[rank].kill()
    await pool.until(lambda: pool.executor.ranks == {0, 1, 2} and pool.executor.num_restarts == 2)
    specs = [pool.workers[rank].spec for rank in (0, 1)]
    assert [spec.has_text_encoders(spec.cards[0]) for spec in specs] == [True, False]


async def test_a_task_that_fails_frees_its_ranks_and_no_others(pools: Callable[..., Pool]) -> None:
    """Tasks are aborted by their tokens, which each worker was told: a rank's next task has a higher one."""
    pool = await started(pools(4))
    region = pool.executor._region
    pool.start_task(7, (0, 1))
    pool.start_task(3, (2, 3))
    tokens = [(await _told(pool, rank)).token for rank in range(4)]
    assert tokens == [1, 1, 2, 2]
    pool.workers[1].say(TaskError(7, FailureKind.STEP, "denoise failed: ValueError: no", 1.0))
    await pool.until(lambda: region.words[region.aborted(0)] > 0)
    assert [region.words[region.aborted(rank)] for rank in range(4)] == [1, 1, 0, 0]
    pool.workers[0].say(TaskError(7, FailureKind.LOST, "denoise failed: PeerLost: a peer is gone", 1.1))
    await pool.until(lambda: pool.events[-1] == TaskFailed(7, FailureKind.STEP, "denoise failed: ValueError: no"))
    pool.start_task(8, (0, 1))
    assert (await _told(pool, 0)).token == 3
    pool.workers[3].kill()
    await pool.until(lambda: region.words[region.aborted(2)] > 0)
    # The dead rank's word is the last token of all: whatever its replacement took part in is over.
    assert [region.words[region.aborted(rank)] for rank in range(4)] == [1, 1, 2, 3]


async def _told(pool: Pool, rank: int) -> RunTask:
    heard: list[Any] = []

    def is_told() -> bool:
        heard.extend(message for message in pool.workers[rank].heard() if isinstance(message, RunTask))
        return bool(heard)

    await pool.until(is_told)
    (message,) = heard
    assert isinstance(message, RunTask)
    return message


@pytest.mark.parametrize("timeouts", [{"group_timeout_s": 0.05}, {"heartbeat_timeout_s": 1.0}])
async def test_a_step_that_failed_is_no_lost_task_because_a_peer_got_stuck_in_it(
    pools: Callable[..., Pool], timeouts: dict[str, float]
) -> None:
    """Whether it is the collective's timeout or the heartbeat's: the shorter counts."""
    pool = await started(pools(2, **timeouts))
    pool.start_task(1, (0, 1))
    pool.workers[1].say(TaskError(1, FailureKind.STEP, "denoise failed: MemoryError: no room", 1.0))

    def has_failed() -> bool:
        for worker in filter(PlayedWorker.is_alive, pool.workers.values()):
            worker.say(Heartbeat(0))  # neither is silent: that would be another reason to replace it
        return any(isinstance(event, TaskFailed) for event in pool.events)

    await pool.until(has_failed)
    lost, failed = [event for event in pool.events if isinstance(event, WorkerLost | TaskFailed)]
    assert isinstance(lost, WorkerLost)
    assert (lost.rank, lost.reason) == (0, f"stuck after a peer failed, for {min(timeouts.values()):g} s")
    assert failed == TaskFailed(1, FailureKind.STEP, "denoise failed: MemoryError: no room")
    await pool.until(lambda: WorkerJoined(0) in pool.events[pool.events.index(lost) :])


async def test_a_worker_that_dies_explains_the_errors_of_its_peers(pools: Callable[..., Pool]) -> None:
    pool = await started(pools(2))
    pool.start_task(1, (0, 1))
    pool.workers[1].say(TaskError(1, FailureKind.STEP, "denoise failed: strange words of a collective", 1.0))
    await asyncio.sleep(0.05)
    pool.workers[0].kill()
    await pool.until(lambda: any(isinstance(event, TaskFailed) for event in pool.events))
    (failed,) = [event for event in pool.events if isinstance(event, TaskFailed)]
    assert failed == TaskFailed(1, FailureKind.LOST, "rank 0 was lost: its process ended")


async def test_a_rank_that_ran_out_of_memory_is_replaced_before_its_task_is_planned_again(
    pools: Callable[..., Pool],
) -> None:
    pool = await started(pools(2))
    starved = pool.workers[1]
    pool.start_task(1, (0, 1))
    starved.say(TaskError(1, FailureKind.MEMORY, "denoise failed: MemoryError: no room", 1.0))
    await pool.until(lambda: any(isinstance(event, WorkerLost) for event in pool.events))
    assert starved.exitcode == -9
    pool.workers[0].say(TaskError(1, FailureKind.LOST, "denoise failed: a peer went away", 1.1))
    await pool.until(lambda: any(isinstance(event, TaskFailed) for event in pool.events))
    lost, failed = [event for event in pool.events if isinstance(event, WorkerLost | TaskFailed)]
    assert lost == WorkerLost(1, "ran out of memory: denoise failed: MemoryError: no room")
    message = "a rank ran out of memory: denoise failed: MemoryError: no room"
    assert failed == TaskFailed(1, FailureKind.MEMORY, message)
    await pool.until(lambda: pool.events[-1] == WorkerJoined(1))
    assert pool.workers[1] is not starved


async def test_what_a_killed_worker_had_written_counts_once_and_nothing_after_it(pools: Callable[..., Pool]) -> None:
    pool = await started(pools(2))
    first = pool.workers[0]
    pool.start_task(1, (0,))
    first.say(TaskDone(1, 0.5, (RESULT,)))
    first.lifeline.close()  # its pipe is still open: the kernel takes its time
    await pool.until(lambda: any(isinstance(event, WorkerLost) for event in pool.events))
    finished, lost = pool.events[-2:]
    assert finished == TaskFinished(1, 0.5, (RESULT,))
    assert lost == WorkerLost(0, "its process ended")
    with pytest.raises(BrokenPipeError):
        first.say(TaskDone(1, 0.5, (RESULT,)))
    first.kill()
    await pool.until(lambda: pool.workers[0] is not first and pool.executor.ranks == {0, 1})
    assert sum(isinstance(event, TaskFinished | TaskFailed) for event in pool.events) == 1


async def test_the_answer_of_a_hung_worker_that_wakes_up_after_it_was_given_up_counts_for_nothing(
    pools: Callable[..., Pool],
) -> None:
    pool = await started(pools(2))
    hung = pool.workers[0]
    hung.kill = lambda: None  # type: ignore[method-assign]  # stuck in the kernel
    pool.start_task(1, (0,))
    pool.executor._lose(0, "no sign of life for 2 s")
    hung.exitcode = -9
    with pytest.raises(BrokenPipeError):
        hung.say(TaskDone(1, 0.5, (RESULT,)))
    await pool.until(lambda: pool.workers[0] is not hung and pool.executor.ranks == {0, 1})
    ends = [event for event in pool.events if isinstance(event, TaskFinished | TaskFailed)]
    assert ends == [TaskFailed(1, FailureKind.LOST, "rank 0 was lost: no sign of life for 2 s")]
    hung.connection.close()
    hung.lifeline.close()


async def test_a_replacement_that_hangs_while_it_loads_is_replaced_long_before_the_start_timeout(
    pools: Callable[..., Pool],
) -> None:
    pool = await started(pools(1, heartbeat_timeout_s=0.05))
    beating = asyncio.create_task(_beat(pool))
    first = pool.workers[0]
    pool._on_birth = lambda rank, worker: worker.say(Heartbeat(0))  # and then nothing
    first.kill()
    await pool.until(lambda: pool.workers[0] is not first)
    second = pool.workers[0]
    await pool.until(lambda: pool.workers[0] is not second)
    assert second.exitcode == -9
    beating.cancel()


async def _beat(pool: Pool) -> None:
    """Signs of life of all that are ready."""
    while True:
        for rank in pool.executor.ranks:
            pool.workers[rank].say(Heartbeat(0))
        await asyncio.sleep(0.01)


def framed(content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + content


GARBAGE = {
    "noise": framed(random.Random(0).randbytes(200)),
    "a length that nothing follows": b"\x7f\xff\xff\xff",
    "a negative length": b"\xff\xff\xff\xff\x00",
    "no pickle": framed(b"hello"),
    "a truncated pickle": framed(pickle.dumps(TaskDone(1, 0.5, (RESULT,)))[:-4]),
    "a call": framed(b"cos\nsystem\n(S'exit 3'\ntR."),
    "a call by way of a message's module": framed(pickle.dumps(pickle.dumps)),
    "no message": framed(pickle.dumps(7)),
    "a message of the other direction": framed(pickle.dumps(Forget("a"))),
    "a field of another type": framed(pickle.dumps(TaskDone("1", 0.5, (RESULT,)))),  # type: ignore[arg-type]
    "a field of a field of another type": framed(
        pickle.dumps(TaskDone(1, 0.5, (replace(RESULT, left=TensorRef(7, 1)),)))  # type: ignore[arg-type]
    ),
    "a list of results": framed(pickle.dumps(TaskDone(1, 0.5, [RESULT]))),  # type: ignore[arg-type]
    "no tuple at all": framed(pickle.dumps(TaskDone(1, 0.5, RESULT))),  # type: ignore[arg-type]
    "a result that is none": framed(pickle.dumps(TaskDone(1, 0.5, (RESULT, TensorRef("a", 1))))),  # type: ignore[arg-type]
    "a field of a result of another type": framed(
        pickle.dumps(TaskDone(1, 0.5, (replace(RESULT, num_steps="1"),)))  # type: ignore[arg-type]
    ),
    "a text count of another type": framed(
        pickle.dumps(TaskDone(1, 0.5, (replace(RESULT, text=TextCount("5", False)),)))  # type: ignore[arg-type]
    ),
    "a component of another type": framed(
        pickle.dumps(Ready((), RankMemory((Component("vae", "7"),), 1)))  # type: ignore[arg-type]
    ),
    "a list for a number": framed(pickle.dumps(Heartbeat([]))),  # type: ignore[arg-type]
    "nothing in it": framed(b""),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
async def test_a_worker_that_writes_garbage_is_replaced_and_its_task_ends_as_lost(
    pools: Callable[..., Pool], garbage: bytes
) -> None:
    pool = await started(pools(2))
    first, other = pool.workers[0], pool.workers[1]
    pool.start_task(1, (0,))
    os.write(first.connection.fileno(), garbage)
    first.say(TaskDone(1, 0.5, (RESULT,)))  # whatever it says after that
    await pool.until(lambda: pool.workers[0] is not first and pool.executor.ranks == {0, 1})
    (failed,) = [event for event in pool.events if isinstance(event, TaskFailed | TaskFinished)]
    assert isinstance(failed, TaskFailed)
    assert failed.message.startswith("rank 0 was lost: its message ")
    assert pool.workers[1] is other
    pool.start_task(2, (0,))
    pool.workers[0].say(TaskDone(2, 0.5, (RESULT,)))
    await pool.until(lambda: pool.events[-1] == TaskFinished(2, 0.5, (RESULT,)))


async def test_what_a_worker_wrote_before_the_garbage_counts(pools: Callable[..., Pool]) -> None:
    pool = await started(pools(1))
    pool.start_task(1, (0,))
    done = framed(pickle.dumps(TaskDone(1, 0.5, (RESULT,))))
    os.write(pool.workers[0].connection.fileno(), done + GARBAGE["noise"])
    await pool.until(lambda: pool.events[-1] == WorkerJoined(0) and pool.executor.num_restarts == 1)
    assert TaskFinished(1, 0.5, (RESULT,)) in pool.events


async def test_half_a_message_stops_nobody_and_is_read_once_it_is_whole(pools: Callable[..., Pool]) -> None:
    pool = await started(pools(2))
    pool.start_task(1, (0,))
    pool.start_task(2, (1,))
    other = replace(RESULT, left=TensorRef("a.denoise.1.2", 1))
    message = framed(pickle.dumps(TaskDone(1, 0.5, (RESULT,))))
    for at in range(0, len(message) - 1, 7):
        os.write(pool.workers[0].connection.fileno(), message[at : min(at + 7, len(message) - 1)])
        await asyncio.sleep(0.001)
    pool.workers[1].say(TaskDone(2, 0.5, (other,)))
    await pool.until(lambda: pool.events[-1] == TaskFinished(2, 0.5, (other,)))
    os.write(pool.workers[0].connection.fileno(), message[-1:])
    await pool.until(lambda: pool.events[-1] == TaskFinished(1, 0.5, (RESULT,)))
    assert pool.executor.num_restarts == 0


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=60), is_framed=st.booleans(), cut=st.integers(0, 60))
def test_no_bytes_make_the_inbox_do_anything_but_refuse_them(content: bytes, is_framed: bool, cut: int) -> None:
    real = pickle.dumps(TaskError(1, FailureKind.STEP, "text", 1.0))
    written = framed(real[:cut] + content) if is_framed else content + real[cut:]
    ours, theirs = multiprocessing.Pipe()
    os.write(theirs.fileno(), written or b"\0")
    with contextlib.suppress(Garbled):
        assert all(isinstance(message, get_args(FromWorker)) for message in Inbox(ours).read())
    ours.close()
    theirs.close()


async def test_an_image_that_cannot_be_read_is_an_error_of_its_request(pools: Callable[..., Pool]) -> None:
    pool = pools(1)
    with pytest.raises(RequestFailed, match=r"the finished image cannot be read \(StateGone\)"):
        await read_output(pool.executor.states, Output(TensorRef("a.decode.0.2", 1), RAW_PIXELS), OUTCOME)


async def test_a_message_that_cannot_be_handled_costs_its_worker_and_not_the_request(
    pools: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = await started(pools(1))
    first = pool.workers[0]
    pool.start_task(1, (0,))
    with monkeypatch.context() as patch:

        def starve(rank: int, message: object) -> None:
            raise MemoryError

        patch.setattr(pool.executor, "_answer", starve)
        first.say(TaskDone(1, 0.5, (RESULT,)))
        await pool.until(lambda: any(isinstance(event, TaskFailed) for event in pool.events))
    (failed,) = [event for event in pool.events if isinstance(event, TaskFailed)]
    assert failed == TaskFailed(1, FailureKind.LOST, "rank 0 was lost: its message could not be handled: MemoryError")
    await pool.until(lambda: pool.workers[0] is not first and pool.executor.ranks == {0})


@pytest.mark.parametrize("results", [(), (RESULT, RESULT)])
async def test_a_leader_with_another_number_of_results_than_requests_is_replaced_and_its_task_ends_as_lost(
    pools: Callable[..., Pool], results: tuple[Result, ...]
) -> None:
    pool = await started(pools(2))
    first, other = pool.workers[0], pool.workers[1]
    pool.start_task(1, (0, 1))
    other.say(TaskDone(1, 0.5))
    first.say(TaskDone(1, 0.5, results))
    await pool.until(lambda: pool.workers[0] is not first and pool.executor.ranks == {0, 1})
    (failed,) = [event for event in pool.events if isinstance(event, TaskFailed | TaskFinished)]
    assert failed == TaskFailed(1, FailureKind.LOST, "rank 0 was lost: its message could not be handled: ValueError")
    assert pool.workers[1] is other
    pool.start_task(2, (0,))
    pool.workers[0].say(TaskDone(2, 0.5, (RESULT,)))
    await pool.until(lambda: pool.events[-1] == TaskFinished(2, 0.5, (RESULT,)))


async def test_of_each_request_of_a_task_the_copy_that_it_replaces_is_dropped_and_no_other(
    pools: Callable[..., Pool],
) -> None:
    pool = await started(pools(1))
    directory = pool.executor._directory.path
    works, results = [], []
    for name in ("a", "b"):
        states = {
            stage: pool.executor.states.put(f"{name}.{stage}.{steps}.0", b"x")
            for stage, steps in ((ENCODE, 0), (DENOISE, 1))
        }
        works.append(Work(replace(REQUEST, request_id=name), 1, 1, states))
        after = pool.executor.states.put(f"{name}.denoise.2.1", b"x")
        results.append(Result(after, 1, is_stage_over=False))
    pool.executor.start_task(StartTask(1, Task(("a", "b"), DENOISE, (0,), 1), tuple(works)))
    pool.workers[0].say(TaskDone(1, 0.5, tuple(results)))
    await pool.until(lambda: TaskFinished(1, 0.5, tuple(results)) in pool.events)
    assert sorted(path.name for path in directory.glob("*.safetensors")) == [
        f"{name}.{key}.safetensors" for name in ("a", "b") for key in ("denoise.2.1", "encode.0.0")
    ]


async def test_a_copy_that_cannot_be_dropped_keeps_no_task_from_its_end(
    pools: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(ref: TensorRef) -> None:
        raise OSError(errno.EIO, "Input/output error")

    pool = await started(pools(1))
    monkeypatch.setattr(pool.executor.states, "drop", fail)
    task = Task(("a",), DENOISE, (0,), 1)
    work = Work(REQUEST, 1, 1, {ENCODE: TensorRef("a.encode.0.0", 1), DENOISE: TensorRef("a.denoise.1.0", 1)})
    pool.executor.start_task(StartTask(1, task, (work,)))
    pool.workers[0].say(TaskDone(1, 0.5, (RESULT,)))
    await pool.until(lambda: TaskFinished(1, 0.5, (RESULT,)) in pool.events)


async def test_a_look_at_the_workers_that_fails_is_not_the_last_one(
    pools: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = await started(pools(1, heartbeat_timeout_s=0.1))
    first = pool.workers[0]
    failures: list[float] = []

    def fail_twice() -> None:
        if len(failures) < 2:
            failures.append(0.0)
            raise MemoryError

    monkeypatch.setattr(pool.executor._starter, "keep_fork_server", fail_twice)
    await pool.until(lambda: pool.workers[0] is not first)  # it has said nothing since it was ready
    assert len(failures) == 2


def test_a_step_that_compiles_may_take_as_long_as_a_start() -> None:
    pool = PoolConfig(device="cuda", num_ranks=1)
    compiled = replace(CARD, execution=Execution("bfloat16", compile="regional"))
    assert [LocalExecutor([card], pool)._pool.step_timeout_s for card in (CARD, compiled)] == [60.0, 300.0]


def test_restarts_wait_longer_and_longer_but_go_on_for_ever() -> None:
    assert [restart_delay_s(num_failed) for num_failed in (0, 1, 2, 4, 5, 5000)] == [0.0, 2.0, 4.0, 16.0, 30.0, 30.0]
