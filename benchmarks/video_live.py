"""Images with tight deadlines and videos with loose ones in one live pool: `lookahead` against one fixed degree.

Two CPU ranks hold the bundled model and a tiny Wan with random weights. The same requests, arriving at the same times,
are sent to an engine under each policy in turn: images with a deadline of `--image-slo` times what they take alone at
degree 1, videos of `--video-s` seconds with `--video-slo` times. Prints attainment of all, of images and of videos,
and the longest time that an image waited. Bars, in one run: `lookahead` attains at least 15 points more than the better
fixed degree, first come first served; no image waits for as long as a video takes; every video ends. Run it on an idle
machine with

    python benchmarks/video_live.py [--load 0.7] [--images 60] [--videos 8] [--seed 0]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tetriserve.config import EngineConfig, ModelConfig, PoolConfig, SchedulingConfig
from tetriserve.core.cost import narrowest_s, stages_gpu_s
from tetriserve.core.request import Request
from tetriserve.engine import Generation, LiveEngine, VideoWish
from tetriserve.engine.observers import Observation
from tetriserve.examples import small_wan
from tetriserve.launch import StartProgress, launch
from tetriserve.profile import save_profile
from tetriserve.workload.outcome import Outcome, Status

IMAGES, VIDEOS = "images", "videos"
FIXED = ("fixed:1", "fixed:2")
BAR_POINTS = 15.0
IMAGE_SIZES, VIDEO_SIZE, NUM_FRAMES = ("256x256", "512x512"), "256x256", 33
IMAGE_STEPS = 20
QUIET = StartProgress(step=lambda text: None)


@dataclass(frozen=True)
class Arrival:
    """at_s: seconds after the first."""

    at_s: float
    generation: Generation


@dataclass(frozen=True)
class Run:
    """What one policy made of the arrivals."""

    policy: str
    outcomes: tuple[Outcome, ...]

    def of(self, model: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.request.model == model]

    @staticmethod
    def sar(outcomes: Sequence[Outcome]) -> float:
        """In percent."""
        return 100 * statistics.fmean(outcome.is_attained for outcome in outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=float, default=0.7, help="least rank time of what arrives, over the pool's")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--videos", type=int, default=8)
    parser.add_argument("--video-s", type=float, default=5.0)
    parser.add_argument("--image-slo", type=float, default=2.0)
    parser.add_argument("--video-slo", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # profiles are measured by the first engine
        small_wan.build(Path(folder) / "wan")
        sys.exit(asyncio.run(compare(options, str(Path(folder) / "wan"))))


async def compare(options: argparse.Namespace, wan: str) -> int:
    console = Console(highlight=False)
    arrivals: list[Arrival] | None = None
    runs = []
    video_s = 0.0
    profiles: dict[str, str] = {}
    for policy in ("lookahead", *FIXED):
        config = EngineConfig(
            models=(
                ModelConfig(name=IMAGES, profile=profiles.get(IMAGES)),
                ModelConfig(name=VIDEOS, path=wan, profile=profiles.get(VIDEOS)),
            ),
            pool=PoolConfig(num_ranks=2),
            scheduling=SchedulingConfig(policy=policy),
        )
        jobs = await launch(config, QUIET)
        try:
            if arrivals is None:
                profiles = keep_profiles(jobs.engine, Path(wan).parent)
                arrivals, video_s = arrivals_of(jobs.engine, options)
            runs.append(await serve(policy, jobs.engine, arrivals))
        finally:
            await jobs.stop()
    return report(console, runs, video_s, options)


def keep_profiles(engine: LiveEngine, folder: Path) -> dict[str, str]:
    """Files of what the first engine measured, which the others plan with too."""
    kept = {}
    for intake in engine.models.intakes:
        path = folder / f"{intake.card.key}.json"
        save_profile(intake.cost.profile, path)
        kept[intake.card.key] = str(path)
    return kept


def arrivals_of(engine: LiveEngine, options: argparse.Namespace) -> tuple[list[Arrival], float]:
    """The requests, in order of arrival, and seconds that a video takes alone at degree 1."""
    dice = random.Random(options.seed)
    one = probe(engine, video(1, 1.0, 0))
    step_s = min(engine.controller.cost.times(one, one.stepped).values())
    num_steps = max(4, min(200, round(options.video_s / step_s)))
    generations = [image(dice.choice(IMAGE_SIZES), None, dice.getrandbits(32)) for _ in range(options.images)] + [
        video(num_steps, None, dice.getrandbits(32)) for _ in range(options.videos)
    ]
    dice.shuffle(generations)
    probes = [probe(engine, generation) for generation in generations]
    cost = engine.controller.cost
    gpu_s = sum(stages_gpu_s(cost, request, request.stages) for request in probes)
    mean_s = gpu_s / len(generations) / (options.load * len(engine.state.ranks))
    arrivals, now = [], 0.0
    for generation, request in zip(generations, probes, strict=True):
        scale = options.video_slo if generation.is_video else options.image_slo
        slo_s = scale * narrowest_s(cost, request)
        arrivals.append(Arrival(now, with_deadline(generation, slo_s)))
        now += dice.expovariate(1 / mean_s)
    alone_s = max(narrowest_s(cost, request) for request in probes)
    return arrivals, alone_s


def image(size: str, slo_s: float | None, seed: int) -> Generation:
    return Generation(model=IMAGES, prompt="a red circle", size=size, num_steps=IMAGE_STEPS, slo_s=slo_s, seed=seed)


def video(num_steps: int, slo_s: float | None, seed: int) -> Generation:
    return Generation(
        model=VIDEOS, prompt="a red circle", size=VIDEO_SIZE, num_steps=num_steps, slo_s=slo_s, seed=seed,
        video=VideoWish(num_frames=NUM_FRAMES),
    )  # fmt: skip


def with_deadline(generation: Generation, slo_s: float) -> Generation:
    if generation.is_video:
        return video(generation.num_steps or 1, slo_s, generation.seed or 0)
    return image(generation.size or "", slo_s, generation.seed or 0)


def probe(engine: LiveEngine, generation: Generation) -> Request:
    intake = engine.models.called(generation.model, makes_videos=generation.is_video)
    return intake.request(generation, request_id="probe", seed=0, now=0.0, cost=engine.controller.cost)


async def serve(policy: str, engine: LiveEngine, arrivals: Sequence[Arrival]) -> Run:
    outcomes: list[Outcome] = []

    def observe(observation: Observation) -> None:
        if isinstance(observation, Outcome):
            outcomes.append(observation)

    engine.subscribe(observe)
    begun = engine.now

    async def send(arrival: Arrival) -> None:
        await asyncio.sleep(max(0.0, begun + arrival.at_s - engine.now))
        await engine.generate_all([arrival.generation])

    await asyncio.gather(*(send(arrival) for arrival in arrivals), return_exceptions=True)
    assert len(outcomes) == len(arrivals), f"{len(outcomes)} of {len(arrivals)} requests have ended"
    return Run(policy, tuple(outcomes))


def report(console: Console, runs: Sequence[Run], video_s: float, options: argparse.Namespace) -> int:
    table = Table(title=f"Attained, %, of {options.images} images and {options.videos} videos at load {options.load:g}")
    for heading in ("policy", "all", "images", "videos", "longest wait of an image, s", "videos that ended"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for run in runs:
        waited_s = max(outcome.queued_s for outcome in run.of(IMAGES))
        ended = sum(outcome.status is Status.FINISHED for outcome in run.of(VIDEOS))
        sars = [Run.sar(outcomes) for outcomes in (run.outcomes, run.of(IMAGES), run.of(VIDEOS))]
        table.add_row(run.policy, *(f"{sar:.1f}" for sar in sars), f"{waited_s:.2f}", f"{ended} of {options.videos}")
    console.print(table)
    console.print(f"a video takes {video_s:.1f} s alone at degree 1")
    ours, *others = runs
    gain = Run.sar(ours.outcomes) - max(Run.sar(run.outcomes) for run in others)
    waited_s = max(outcome.queued_s for outcome in ours.of(IMAGES))
    bars = {
        f"lookahead attains {gain:.1f} points more than the better fixed degree (bar {BAR_POINTS:g})": gain
        >= BAR_POINTS,
        f"no image waited for a whole video: at most {waited_s:.2f} s": waited_s < video_s,
        "every video ended": all(outcome.status is Status.FINISHED for outcome in ours.of(VIDEOS)),
    }
    for text, is_met in bars.items():
        console.print(f"{'yes' if is_met else 'NO ':3}  {text}")
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    main()
