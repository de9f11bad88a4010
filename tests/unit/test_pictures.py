"""Pictures on their way into the store: there before their request is, and gone if it is not admitted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load

from tests.states import MemoryStates
from tests.unit import test_live_engine as live
from tests.unit.test_live_engine import ObedientExecutor
from tests.unit.test_picture_rules import STARTING, profile_of
from tests.waiting import HANG_S, until
from tetriserve.core.errors import DeadlineInfeasible, InvalidRequest, KeyReused, QueueFull
from tetriserve.core.events import StartTask, TensorRef
from tetriserve.core.request import Shape
from tetriserve.core.stages import ENCODE_IMAGE, INPUT
from tetriserve.engine import Generation, Intake, Jobs, LiveEngine
from tetriserve.engine.jobs import digest_of
from tetriserve.engine.models import ServedModels
from tetriserve.engine.pictures import InputPicture, PictureEntrance
from tetriserve.journal import Key
from tetriserve.profile import ProfileCost

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
PICTURE = InputPicture.of(PIXELS)
OTHER = InputPicture.of(PIXELS + 1)


class Recorder(ObedientExecutor):
    """Notes what is in the store when a task starts; while `gate` is clear no task does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, np.ndarray]]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self._running: set[asyncio.Task[None]] = set()

    def start_task(self, command: StartTask) -> None:
        running = asyncio.create_task(self._run(command))
        self._running.add(running)
        running.add_done_callback(self._running.discard)

    async def _run(self, command: StartTask) -> None:
        await self.gate.wait()
        [work] = command.work
        if INPUT in work.states:
            self.seen.append((command.task.stage, load(self.states.get(work.states[INPUT]))))
        super().start_task(command)

    @property
    def inputs(self) -> list[str]:
        return [key for key in self.states.bundles if f".{INPUT}." in key]


def running(executor: ObedientExecutor, monkeypatch: pytest.MonkeyPatch) -> LiveEngine:
    cost = ProfileCost(profile_of(Shape(256, 256)))
    monkeypatch.setattr(live, "COST", cost)
    engine, _ = live.running(executor)
    engine.models = ServedModels((Intake(card=STARTING, cost=cost),))
    return engine


@pytest.fixture
async def executor() -> Recorder:
    return Recorder()


@pytest.fixture
async def engine(executor: Recorder, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LiveEngine]:
    engine = running(executor, monkeypatch)
    yield engine
    executor.gate.set()
    await engine.stop()


def edit(**fields: Any) -> Generation:
    return Generation(**{"prompt": "p", "images": (PICTURE,), **fields})


async def test_pictures_are_in_the_store_before_the_first_task_and_go_with_their_request(
    engine: LiveEngine, executor: Recorder
) -> None:
    image = await asyncio.wait_for(engine.generate(edit()), HANG_S)
    assert [run.task.stage for run in image.outcome.runs][1] == ENCODE_IMAGE
    assert list(dict.fromkeys(stage for stage, _ in executor.seen)) == ["encode", ENCODE_IMAGE, "denoise", "decode"]
    for _, pictures in executor.seen:
        assert list(pictures) == ["0"]
        np.testing.assert_array_equal(pictures["0"], PIXELS)
    assert executor.inputs == []


async def test_each_of_several_images_has_pictures_of_its_own(engine: LiveEngine, executor: Recorder) -> None:
    await engine.generate_all([edit(), edit(images=(OTHER,)), Generation(prompt="none")])
    shown = [pictures["0"] for stage, pictures in executor.seen if stage == ENCODE_IMAGE]
    assert [np.array_equal(each, PIXELS) for each in shown] == [True, False]
    assert executor.inputs == []


@pytest.mark.parametrize(
    ("generations", "error"),
    [
        ([edit(), edit(images=(PICTURE, PICTURE))], InvalidRequest),
        ([edit(slo_s=1e-3, reject_infeasible=True)], DeadlineInfeasible),
        ([edit(request_id="mine"), edit(request_id="mine")], InvalidRequest),
        ([edit()] * 10, QueueFull),
    ],
)
async def test_a_refusal_leaves_nothing_in_the_store(
    engine: LiveEngine, executor: Recorder, generations: list[Generation], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await engine.generate_all(generations)
    assert executor.states.bundles == {}


async def test_what_is_refused_after_its_pictures_are_there_takes_them_along(
    engine: LiveEngine, executor: Recorder
) -> None:
    async def accept(arriving: object) -> None:
        assert len(executor.inputs) == 2
        raise OSError("the journal is gone")

    with pytest.raises(OSError, match="the journal is gone"):
        await engine.admit([edit(), edit()], accept=accept)
    assert executor.states.bundles == {}
    assert engine.state.trajectories == ()


async def test_a_store_without_room_refuses_for_now(engine: LiveEngine, executor: Recorder) -> None:
    executor.states.has_room = False
    with pytest.raises(QueueFull, match="no room for the pictures that came along: No space left") as full:
        await engine.generate(edit())
    assert full.value.retry_after_s == 1.0
    executor.states.has_room = True
    await engine.generate(edit())
    assert executor.inputs == []


async def test_all_pictures_together_are_bounded(engine: LiveEngine, executor: Recorder) -> None:
    size = 3 * PICTURE.shape.num_pixels
    engine._entrance = PictureEntrance(executor.states, 2 * size)
    with pytest.raises(InvalidRequest, match=f"have {3 * size} bytes as pixels.*allowed: {2 * size}"):
        await engine.generate_all([edit()] * 3)
    executor.gate.clear()
    first = asyncio.create_task(engine.generate(edit()))
    await until(lambda: engine.open_requests)
    with pytest.raises(QueueFull, match=f"those of unfinished requests have {size}, of at most {2 * size}"):
        await engine.generate_all([edit(), edit()])
    second = asyncio.create_task(engine.generate(edit()))
    await until(lambda: len(engine.open_requests) == 2)
    executor.gate.set()
    await asyncio.gather(first, second)
    await engine.generate_all([edit(), edit()])


async def test_a_clients_own_name_overwrites_no_pictures_of_another(engine: LiveEngine, executor: Recorder) -> None:
    executor.gate.clear()
    both = [asyncio.create_task(engine.generate(edit(request_id="mine", images=(each,)))) for each in (PICTURE, OTHER)]
    await until(lambda: any(each.done() for each in both))
    executor.gate.set()
    results = await asyncio.gather(*both, return_exceptions=True)
    (kept,) = [number for number, result in enumerate(results) if not isinstance(result, BaseException)]
    assert isinstance(results[1 - kept], InvalidRequest)
    for _, pictures in executor.seen:
        np.testing.assert_array_equal(pictures["0"], (PIXELS, PIXELS + 1)[kept])
    assert executor.states.bundles == {}


class SlowToPut(MemoryStates):
    """Pictures are written once `may_write` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.is_writing, self.may_write, self.has_written = (threading.Event() for _ in range(3))

    def put(self, key: str, data: bytes) -> TensorRef:
        if f".{INPUT}." not in key:
            return super().put(key, data)
        self.is_writing.set()
        assert self.may_write.wait(HANG_S)
        ref = super().put(key, data)
        self.has_written.set()
        return ref


async def test_a_client_that_leaves_while_its_picture_is_written_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor = Recorder()
    executor.states = states = SlowToPut()
    engine = running(executor, monkeypatch)
    leaving = asyncio.create_task(engine.generate(edit()))
    await until(states.is_writing.is_set)
    await engine.generate(Generation(prompt="nobody waits for the store"))
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert leaving.cancelled()
    states.may_write.set()
    await until(states.has_written.is_set)
    await until(lambda: states.bundles == {})
    await engine.stop()


async def test_a_key_stands_for_its_pictures_too(engine: LiveEngine) -> None:
    jobs, key = Jobs(engine), Key("tenant", "k")
    (first,) = await jobs.call(key, [edit(strength=0.5)]).images()
    (again,) = await jobs.call(key, [edit(strength=0.5, images=(InputPicture.of(PIXELS.copy()),), slo_s=5)]).images()
    assert again is first
    for other in (edit(strength=0.6), edit(strength=0.5, images=(OTHER,)), Generation(prompt="p")):
        with pytest.raises(KeyReused):
            jobs.call(key, [other])


def test_digests_tell_pictures_apart_by_their_pixels_their_shape_and_their_order() -> None:
    turned = InputPicture(Shape(60, 40), PICTURE.data)
    orders = ([PICTURE], [OTHER], [turned], [PICTURE, OTHER], [OTHER, PICTURE], [])
    digests = [digest_of([edit(images=tuple(pictures))]) for pictures in orders]
    assert len(set(digests)) == len(orders)
    assert digest_of([edit()]) == digests[0]


def test_pictures_are_in_no_repr() -> None:
    assert "\\x" not in repr(edit())


@pytest.mark.parametrize("pixels", [PIXELS.astype(float), PIXELS[0], PIXELS[:, :, :2], PIXELS[:0]])
def test_arrays_of_another_form_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        InputPicture.of(pixels)


def test_an_image_of_pillow_is_the_same_as_its_pixels() -> None:
    assert InputPicture.of_image(Image.fromarray(PIXELS)) == PICTURE
    assert InputPicture.of_image(Image.fromarray(PIXELS).convert("L")).shape == PICTURE.shape


def test_the_digest_of_a_prompt_alone_is_that_of_journals_from_before_there_were_pictures() -> None:
    assert digest_of([Generation(prompt="a lighthouse", seed=7)]) == "7f4038e4f1b10a19ab26c9abdc4d661c"
