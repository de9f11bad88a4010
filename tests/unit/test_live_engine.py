"""The live engine on an executor that ends each task as the test wants: nobody who waits is forgotten."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.states import MemoryStates, bundle_of
from tests.waiting import HANG_S, until
from tetriserve.control import Controller
from tetriserve.control.foresight import Foresight
from tetriserve.core.errors import InvalidRequest, RequestFailed, ShuttingDown
from tetriserve.core.events import StartTask, Submitted, TaskFinished, TensorRef
from tetriserve.core.execution import Execution
from tetriserve.core.plan import Plan, State
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.engine import EndedTask, GeneratedImage, Generation, Intake, LiveEngine, Observation, Occurred, Stopped
from tetriserve.models.card import ModelCard
from tetriserve.policies.policy import Policy
from tetriserve.policies.registry import make_policy
from tetriserve.profile import Profile, ProfileCost, Row
from tetriserve.workload.outcome import Outcome, Status
from tetriserve.workload.slo import MultipleRule

if TYPE_CHECKING:
    from tetriserve.executor import OnEvent

CARD = ModelCard(
    name="tiny", path=Path("tiny"), family="flux", pipeline_class="FluxPipeline",
    execution=Execution("float32"), size_multiple=32,
    pixels_per_token=32, num_heads=8, num_text_tokens=64, default_num_steps=2, default_guidance_scale=3.5,
    has_guidance=True, has_negative_prompt=True, sizes=(Shape(256, 256),), fingerprint="abc",
)  # fmt: skip
COST = ProfileCost(
    Profile(
        model="tiny",
        hardware="h",
        execution=Execution("float32"),
        source="s",
        created="c",
        switch_s=0.001,
        rows=(
            Row(stage=ENCODE, seconds=0.01),
            Row(stage=DENOISE, height=256, width=256, tokens=64, degree=1, seconds=0.01),
            Row(stage=DECODE, height=256, width=256, seconds=0.01),
        ),
    )
)


class ObedientExecutor:
    """One rank whose tasks end at once; the images of prompts in `unreadable` cannot be read."""

    ranks = frozenset({0})

    def __init__(self, unreadable: str = "") -> None:
        self._unreadable = unreadable
        self.states = MemoryStates()
        self.preview_bases: dict[str, TensorRef] = {}
        self.forgotten: list[str] = []
        self._on_event: OnEvent = lambda event: None

    def subscribe(self, on_event: OnEvent) -> None:
        self._on_event = on_event

    async def start(self, on_progress: Callable[[str], None]) -> None: ...

    def start_task(self, command: StartTask) -> None:
        request = command.work[0].request
        left = TensorRef(f"{request.request_id}.{command.task.stage}", 1)
        if command.task.stage == DECODE and request.prompt != self._unreadable:
            left = self.states.put(left.key, bundle_of(pixels=np.zeros((256, 256, 3), np.uint8)))
        ended = TaskFinished.planned(command, 0.01, left)
        asyncio.get_running_loop().call_soon(lambda: self._on_event(ended))

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)
        for ref in self.states.list(request_id):
            self.states.drop(ref)

    async def stop(self) -> None: ...


def running(executor: ObedientExecutor, policy: Policy | None = None) -> tuple[LiveEngine, list[Outcome]]:
    policy = policy or make_policy("fcfs", COST, num_ranks=1, shapes=[Shape(256, 256)])
    engine = LiveEngine(
        Controller(policy, COST),
        executor,
        [Intake(card=CARD, cost=COST)],
        Foresight(lambda: policy),
        max_queue=9,
        policy_name="test",
    )
    engine.start()
    outcomes: list[Outcome] = []

    def observe(observation: Observation) -> None:
        if isinstance(observation, Outcome):
            outcomes.append(observation)

    engine.subscribe(observe)
    return engine, outcomes


async def test_an_image_that_cannot_be_read_fails_its_request_alone() -> None:
    executor = ObedientExecutor(unreadable="bad")
    engine, outcomes = running(executor)
    clients = [asyncio.create_task(engine.generate(Generation(prompt=prompt))) for prompt in ("good", "bad", "fine")]
    good, bad, fine = await asyncio.wait_for(asyncio.gather(*clients, return_exceptions=True), HANG_S)
    assert not isinstance(good, BaseException)
    assert not isinstance(fine, BaseException)
    assert isinstance(bad, RequestFailed)
    assert {outcome.request.prompt: outcome.status for outcome in outcomes} == {
        "good": Status.FINISHED, "bad": Status.FAILED, "fine": Status.FINISHED
    }  # fmt: skip
    assert len(executor.forgotten) == 3
    assert engine.failure is None
    assert engine.is_ready
    await engine.stop()


class SlowStates(MemoryStates):
    """Reads of `slow` wait until `may_read` is set."""

    def __init__(self, slow: str) -> None:
        super().__init__()
        self.is_reading = threading.Event()
        self.may_read = threading.Event()
        self._slow = slow

    def get(self, ref: TensorRef) -> bytes:
        if ref.key.startswith(self._slow):
            self.is_reading.set()
            assert self.may_read.wait(HANG_S)
        return super().get(ref)


async def test_an_output_that_is_slow_to_read_holds_up_no_other_request() -> None:
    executor = ObedientExecutor()
    executor.states = states = SlowStates("slow.")
    engine, outcomes = running(executor)
    slow = asyncio.create_task(engine.generate(Generation(prompt="p", request_id="slow")))
    await until(states.is_reading.is_set)
    for name in ("one", "two"):
        await asyncio.wait_for(engine.generate(Generation(prompt="p", request_id=name)), HANG_S)
    assert [outcome.request.request_id for outcome in outcomes] == ["one", "two"]
    assert executor.forgotten == ["one", "two"], "what is read is not dropped"
    with pytest.raises(InvalidRequest, match="'slow' is that of an unfinished request"):
        await engine.generate(Generation(prompt="p", request_id="slow"))
    states.may_read.set()
    image = await asyncio.wait_for(slow, HANG_S)
    assert image.pixels.shape == (256, 256, 3)
    assert executor.forgotten == ["one", "two", "slow"]
    assert outcomes[-1] is image.outcome
    await engine.stop()


async def test_a_client_that_leaves_while_its_output_is_read_disturbs_nothing() -> None:
    executor = ObedientExecutor()
    executor.states = states = SlowStates("slow.")
    engine, outcomes = running(executor)
    leaving = asyncio.create_task(engine.generate(Generation(prompt="p", request_id="slow")))
    await until(states.is_reading.is_set)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    states.may_read.set()
    await until(lambda: executor.forgotten == ["slow"])
    assert [outcome.status for outcome in outcomes] == [Status.FINISHED]
    assert not engine.open_requests
    await engine.stop()


async def test_a_stop_waits_for_no_output_longer_than_it_may() -> None:
    executor = ObedientExecutor()
    executor.states = states = SlowStates("slow.")
    engine, outcomes = running(executor)
    waiting = asyncio.create_task(engine.generate(Generation(prompt="p", request_id="slow")))
    await until(states.is_reading.is_set)
    await engine.stop(0.01)
    with pytest.raises(ShuttingDown):
        await waiting
    states.may_read.set()
    assert [outcome.status for outcome in outcomes] == [Status.FAILED]


async def test_the_default_deadline_of_the_next_image_follows_what_the_last_one_took() -> None:
    engine, outcomes = running(ObedientExecutor())
    await engine.generate(Generation(prompt="a lighthouse"))
    learnt = engine.controller.cost
    await engine.generate(Generation(prompt="a lighthouse"))
    first, second = (outcome.request for outcome in outcomes)
    assert first.deadline_s - first.arrival_s == pytest.approx(MultipleRule(3.0, COST).slo_s(first))
    assert second.deadline_s - second.arrival_s == pytest.approx(MultipleRule(3.0, learnt).slo_s(second))
    assert MultipleRule(3.0, learnt).slo_s(second) != pytest.approx(MultipleRule(3.0, COST).slo_s(second))
    await engine.stop()


async def test_observers_that_raise_disturb_neither_requests_nor_other_observers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, outcomes = running(ObedientExecutor())
    seen: list[Observation] = []

    def broken(observation: Observation) -> None:
        seen.append(observation)
        raise ValueError("a bad label")

    def watch(number: int, update: object) -> None:
        raise KeyError("a bad watcher")

    engine.subscribe(broken)
    engine.subscribe(seen.append)
    (image,) = await engine.generate_all([Generation(prompt="a lighthouse")], watch)
    assert isinstance(image, GeneratedImage)
    assert [outcome.status for outcome in outcomes] == [Status.FINISHED]
    assert engine.failure is None
    await engine.stop()
    assert seen[::2] == seen[1::2]
    assert engine.num_observer_errors > len(seen) // 2
    logged = [record.exc_info[0] for record in caplog.records if record.exc_info]
    assert sorted(map(str, logged)) == [str(KeyError), str(ValueError)]


async def test_observers_hear_an_event_then_its_task_then_the_outcome() -> None:
    engine, _ = running(ObedientExecutor())
    seen: list[Observation] = []
    engine.subscribe(seen.append)
    await engine.generate(Generation(prompt="a lighthouse"))
    await engine.stop()
    kinds = [type(seen_.event if isinstance(seen_, Occurred) else seen_) for seen_ in seen]
    assert kinds == [Submitted, *[TaskFinished, EndedTask] * 3, Outcome, Stopped]


class Panic(BaseException):
    """As libraries in Rust raise it."""


@pytest.mark.parametrize("kind", [ZeroDivisionError, Panic])
async def test_a_defect_while_an_image_is_handed_over_leaves_no_client_waiting(kind: type[BaseException]) -> None:
    class Defective(MemoryStates):
        def get(self, ref: TensorRef) -> bytes:
            raise kind("a defect")

    executor = ObedientExecutor()
    executor.states = Defective()
    engine, _ = running(executor)
    with pytest.raises(RequestFailed, match=f"the scheduler failed: {kind.__name__}: a defect"):
        await asyncio.wait_for(engine.generate(Generation(prompt="unlucky")), HANG_S)
    assert not engine.is_ready
    await engine.stop()


async def test_a_policy_that_fails_at_the_second_of_two_images_leaves_nobody_waiting() -> None:
    class Fragile:
        def plan(self, state: State, now: float) -> Plan:
            if len(state.trajectories) == 2:
                raise ZeroDivisionError("two are too many")
            return Plan()

    engine, outcomes = running(ObedientExecutor(), Fragile())
    with pytest.raises(RequestFailed, match="two are too many"):
        await asyncio.wait_for(engine.generate_all([Generation(prompt="one"), Generation(prompt="two")]), HANG_S)
    assert [outcome.status for outcome in outcomes] == [Status.FAILED, Status.FAILED]
    await engine.stop()


@pytest.mark.parametrize("reject", [False, True])
async def test_a_request_id_that_is_in_use_is_the_clients_mistake_and_the_engine_goes_on(reject: bool) -> None:
    class Slow(ObedientExecutor):
        def start_task(self, command: StartTask) -> None:
            asyncio.get_running_loop().call_later(0.1, super().start_task, command)

    engine, outcomes = running(Slow())
    twice = [Generation(prompt="p", request_id="mine", reject_infeasible=reject, slo_s=60) for _ in range(2)]
    with pytest.raises(InvalidRequest, match="request_id 'mine' is that of an unfinished request"):
        await engine.generate_all(twice)
    first, *others = await asyncio.gather(*map(engine.generate, [*twice, twice[0]]), return_exceptions=True)
    assert not isinstance(first, BaseException)
    assert [type(other) for other in others] == [InvalidRequest, InvalidRequest]
    await engine.generate(twice[0])
    assert engine.is_ready
    assert [outcome.status for outcome in outcomes] == [Status.FINISHED] * 2
    await engine.stop()
