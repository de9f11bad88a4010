"""A real engine over an executor that only waits: asyncio timers for ranks, noise for pictures and videos, no torch.

Run as a program, it serves on a free port, prints the URL, and exits as the server does.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
import zlib
from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tetriserve.config import AccessConfig, PoolConfig, ServerConfig
from tetriserve.control import Controller
from tetriserve.control.foresight import Foresight
from tetriserve.core.events import FailureKind, StartTask, TaskFailed, TaskFinished, TensorRef, TextCount
from tetriserve.core.execution import Execution
from tetriserve.core.memory import Component, RankMemory
from tetriserve.core.probes import probe
from tetriserve.core.request import MP4, Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, ENCODE_IMAGE
from tetriserve.engine import Intake, Jobs, JournalledJobs, LiveEngine, Observation
from tetriserve.engine.videos import MAX_BYTES
from tetriserve.executor.protocol import OnEvent
from tetriserve.journal import Journal, Model
from tetriserve.models.card import ModelCard
from tetriserve.models.flux.facts import FLUX
from tetriserve.models.preview import PATCH
from tetriserve.models.ranks import stage_ranks
from tetriserve.models.video_file import VideoFile, VideoWriter
from tetriserve.policies import make_policy
from tetriserve.profile.by_model import CostByModel
from tetriserve.profile.cost import ProfileCost
from tetriserve.profile.table import Profile, Row
from tetriserve.workload.outcome import Outcome

sys.path.append(str(Path(__file__).parents[2]))  # where this file is run as a program

from tests.states import MemoryStates, bundle_of  # noqa: E402

ENCODE_S = DECODE_S = 0.002
STEP_S = 0.004
SIDES = (64, 128, 256)
HELD = (Component("transformer", 3_000_000), Component("vae", 500_000), Component("text_encoder", 1000))
FAILING = "make it fail"
"""A prompt whose denoising fails."""

CARD = ModelCard(
    name="tiny/flux",
    path=Path("tiny"),
    family="flux",
    pipeline_class="FluxPipeline",
    execution=Execution("float32"),
    size_multiple=16,
    pixels_per_token=16,
    num_heads=4,
    num_text_tokens=64,
    default_num_steps=4,
    default_guidance_scale=3.5,
    has_guidance=True,
    has_negative_prompt=True,
    max_images=1,
    default_strength=0.6,
    sizes=(Shape(128, 128), Shape(64, 64), Shape(256, 256)),
    fingerprint="0123456789ab",
)


VIDEO_CARD = replace(
    CARD,
    name="tiny/wan",
    key="videos",
    default_strength=None,
    sizes=(Shape(64, 96, 9), Shape(64, 64, 5)),
    fingerprint="ba9876543210",
    frame_step=4,
    max_frames=17,
    default_fps=8.0,
    has_boundary=True,
    has_flow_shift=True,
)
BOTH = (replace(CARD, key="images"), VIDEO_CARD)
"""Images and videos from one pool."""


def step_s(shape: Shape, degree: int) -> float:
    """Linear in tokens, with 80 % efficiency per doubling of the degree."""
    return STEP_S * FLUX.num_tokens(CARD, shape) / 64 / {1: 1.0, 2: 1.6}[degree]


PROFILE = Profile(
    model=CARD.name,
    hardware="timers",
    execution=Execution("float32"),
    source="made up",
    created="2026-01-01",
    switch_s=0.001,
    rows=(
        Row(stage=ENCODE, seconds=ENCODE_S),
        *(
            Row(
                stage=DENOISE,
                height=side,
                width=side,
                tokens=FLUX.num_tokens(CARD, Shape(side, side)),
                degree=degree,
                seconds=step_s(Shape(side, side), degree),
            )
            for side in SIDES
            for degree in (1, 2)
        ),
        *(
            Row(stage=stage, height=side, width=side, seconds=DECODE_S)
            for stage in (ENCODE_IMAGE, DECODE)
            for side in SIDES
        ),
    ),
)


_VIDEO_SHAPES = (Shape(64, 64, 5), Shape(96, 96, 17))
VIDEO_PROFILE = replace(
    PROFILE,
    model=VIDEO_CARD.name,
    frame_step=4,
    rows=(
        Row(stage=ENCODE, seconds=ENCODE_S),
        *(
            Row(
                stage=DENOISE,
                height=shape.height,
                width=shape.width,
                frames=shape.frames,
                tokens=shape.height * shape.width // 256 * (1 + shape.frames // 4),
                degree=degree,
                seconds=step_s(shape, degree),
            )
            for shape in _VIDEO_SHAPES
            for degree in (1, 2)
        ),
        *(
            Row(stage=stage, height=shape.height, width=shape.width, frames=shape.frames, seconds=DECODE_S)
            for stage in (ENCODE_IMAGE, DECODE)
            for shape in _VIDEO_SHAPES
        ),
    ),
)


def _text_of(command: StartTask) -> TextCount | None:
    """One token a word, and one for the end."""
    if command.task.stage != ENCODE:
        return None
    num_tokens = len(command.work[0].request.prompt.split()) + 1
    return TextCount(num_tokens, num_tokens > CARD.num_text_tokens)


class FakeExecutor:
    """Tasks take the time the profile says, or none at all. While `gate` is clear no task ends.

    has_previews: latents are still there when a preview wants them.
    """

    def __init__(self, *, takes_time: bool = True) -> None:
        self.ranks = frozenset((0, 1))
        self.takes_time = takes_time
        self.gate = asyncio.Event()
        self.gate.set()
        self.forgotten: list[str] = []
        self.is_stopped = False
        self.failure_kind: FailureKind | None = FailureKind.STEP
        self.has_previews = True
        self._tasks: set[asyncio.Task[None]] = set()
        self.started: MutableSequence[StartTask] = []
        self.states = MemoryStates()
        basis = np.zeros((2, PATCH * PATCH * 3), np.float32)
        self.preview_bases: dict[str, TensorRef] = {"": self.states.put(".preview-basis", bundle_of(basis=basis))}
        self.memory = {rank: RankMemory(HELD, 10_000_000 + rank) for rank in self.ranks}
        self._on_event: OnEvent = lambda event: None

    def subscribe(self, on_event: OnEvent) -> None:
        self._on_event = on_event

    async def start(self, on_progress: Callable[[str], None]) -> None:
        on_progress("nothing to start")

    def start_task(self, command: StartTask) -> None:
        self.started.append(command)
        task = asyncio.create_task(self._run(command))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, command: StartTask) -> None:
        task, request = command.task, command.work[0].request
        is_denoise = task.stage == DENOISE
        elapsed_s = task.num_steps * step_s(request.shape, task.degree) if is_denoise else ENCODE_S
        await asyncio.sleep(elapsed_s if self.takes_time else 0)
        await self.gate.wait()
        if is_denoise and request.prompt == FAILING and self.failure_kind is not None:
            self._on_event(TaskFailed(command.task_id, self.failure_kind, "latents are not finite"))
            return
        steps_done = command.work[0].steps_done + task.num_steps
        ref = self.leave(f"{request.request_id}.{task.stage}.{steps_done}.{command.task_id}", task.stage, request)
        end = TaskFinished.planned(command, elapsed_s, ref)
        results = tuple(replace(result, text=_text_of(command)) for result in end.results)
        self._on_event(replace(end, results=results))

    def leave(self, key: str, stage: str, request: Request) -> TensorRef:
        """What a task of `stage` leaves of `request` in the store, under `key`."""
        if stage == DECODE and request.media_type == MP4:
            file = video_file(request)
            arrays = {"video": file.video, "thumbnail": file.thumbnail}
            return self.states.put(
                key, bundle_of(**{name: np.frombuffer(each, np.uint8) for name, each in arrays.items()})
            )
        if stage == DECODE:
            return self.states.put(key, bundle_of(pixels=picture(request.prompt, request.seed, request.shape)))
        if stage in (ENCODE, ENCODE_IMAGE):
            return self.states.put(key, b"state")
        if not self.has_previews:
            return TensorRef(key, num_bytes=1)
        tokens = np.zeros((1, FLUX.num_tokens(CARD, request.shape), 1), np.float32)
        return self.states.put(key, bundle_of(latents=tokens, noise_level=np.float32(0.5)))

    def forget(self, request_id: str) -> None:
        """States stay, so that no test depends on when a journal copies them."""
        self.forgotten.append(request_id)
        for ref in self.states.list(request_id):
            if f".{DECODE}." in ref.key:
                self.states.drop(ref)

    async def stop(self) -> None:
        self.is_stopped = True
        for task in self._tasks:
            task.cancel()


def outcomes_of(engine: LiveEngine) -> list[Outcome]:
    """Of every request that ends from now on."""
    outcomes: list[Outcome] = []

    def observe(observation: Observation) -> None:
        if isinstance(observation, Outcome):
            outcomes.append(observation)

    engine.subscribe(observe)
    return outcomes


def picture(prompt: str, seed: int, shape: Shape) -> np.ndarray:
    """Smooth colours that depend on prompt and seed alone."""
    generator = np.random.default_rng([seed, zlib.crc32(prompt.encode())])
    corners = generator.uniform(0, 255, (2, 2, 3))
    rows, columns = np.linspace(0, 1, shape.height)[:, None, None], np.linspace(0, 1, shape.width)[None, :, None]
    top, bottom = (corners[i, 0] * (1 - columns) + corners[i, 1] * columns for i in (0, 1))
    pixels: np.ndarray = (top * (1 - rows) + bottom * rows).astype(np.uint8)
    return pixels


def video_file(request: Request) -> VideoFile:
    """What a worker leaves of the request: its picture, which moves to the right."""
    assert request.video is not None
    shape = request.shape
    first = picture(request.prompt, request.seed, shape)
    writer = VideoWriter(shape.height, shape.width, request.video.fps)
    for number in range(shape.frames):
        writer.add(np.roll(first, 2 * number, axis=1)[None])
    return writer.finish()


MODEL = Model(CARD.name, CARD.fingerprint)


def make_engine(
    executor: FakeExecutor, *, policy: str = "fcfs", max_queue: int = 64, cards: Sequence[ModelCard] = ()
) -> LiveEngine:
    """A started engine; call it on the loop that it will run on.

    cards: of models that take the same times, but for those of videos, each with a key where there are several; none
        is `CARD`, as it is now.
    """
    cards = cards or (CARD,)
    profiles = {card.key: VIDEO_PROFILE if card.makes_videos else PROFILE for card in cards}
    costs = {key: ProfileCost(profile, lambda shape: CARD.valid_degrees((1, 2))) for key, profile in profiles.items()}
    cost = CostByModel(costs) if len(cards) > 1 else costs[cards[0].key]
    probes = [probe(shape, model=key) for key, profile in profiles.items() for shape in profile.shapes]
    new_policy = partial(make_policy, policy, cost, num_ranks=2, probes=probes)
    basis, *_ = executor.preview_bases.values()
    executor.preview_bases = {card.key: basis for card in cards}
    pool = PoolConfig(num_ranks=2)
    engine = LiveEngine(
        Controller(new_policy(), cost, stage_ranks=stage_ranks(cards, pool)),
        executor,
        [Intake(card=card, cost=costs[card.key]) for card in cards],
        Foresight(new_policy),
        max_queue=max_queue,
        policy_name=policy,
    )
    engine.start()
    return engine


async def make_journalled_jobs(
    executor: FakeExecutor, directory: Path, *, result_ttl_s: float = 3600.0, hold_s: float = 30.0,
    wall_clock: Callable[[], float] = time.time, cards: Sequence[ModelCard] = (), max_video_bytes: int = MAX_BYTES,
    **settings: Any,
) -> JournalledJobs:  # fmt: skip
    """Jobs above a `make_engine`, with a journal in `directory`, whose unfinished work is taken up."""
    cards = cards or (CARD,)
    journal = Journal(directory, *(Model(card.name, card.fingerprint, card.key) for card in cards))
    jobs = JournalledJobs(
        make_engine(executor, cards=cards, **settings), executor, journal,
        result_ttl_s=result_ttl_s, wall_clock=wall_clock, hold_s=hold_s, max_video_bytes=max_video_bytes,
    )  # fmt: skip
    await jobs.recover()
    return jobs


def main() -> int:
    from tetriserve.server import run_server

    parser = argparse.ArgumentParser()
    parser.add_argument("--shutdown-timeout", type=float, default=10.0)
    parser.add_argument("--launch-time", type=float, default=0.0)
    parser.add_argument("--instant", action="store_true", help="tasks take no time")
    parser.add_argument("--api-key", action="append", default=[])
    parser.add_argument("--videos", action="store_true", help="a model of videos beside the one of images")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)

    async def launch() -> Jobs:
        print("launching", flush=True)
        await asyncio.sleep(arguments.launch_time)
        cards = BOTH if arguments.videos else (CARD,)
        return Jobs(make_engine(FakeExecutor(takes_time=not arguments.instant), cards=cards))

    access = AccessConfig(api_keys=tuple(arguments.api_key))
    config = ServerConfig(port=0, shutdown_timeout_s=arguments.shutdown_timeout, access=access)
    return run_server(config, launch, on_ready=lambda url, engine: print(url, flush=True))


if __name__ == "__main__":
    sys.exit(main())
