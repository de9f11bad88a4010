"""The board under load: a pool of timers, 60 requests/s through the real hub into a real page; are frames long?

`--picture` keeps a screenshot, with `--url` of any server. Needs playwright and a Chromium; no model, no GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

from tetriserve.config import ServerConfig
from tetriserve.control import Controller
from tetriserve.control.foresight import Foresight
from tetriserve.core.cost import task_s
from tetriserve.core.errors import TetriServeError
from tetriserve.core.events import StartTask, TaskFinished, TensorRef
from tetriserve.core.execution import Execution
from tetriserve.core.memory import RankMemory
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.engine import Generation, Intake, Jobs, LiveEngine
from tetriserve.executor.protocol import OnEvent
from tetriserve.models.card import ModelCard
from tetriserve.models.flux.facts import FLUX
from tetriserve.policies import make_policy
from tetriserve.profile import Profile, ProfileCost, Row
from tetriserve.server import run_server

sys.path.append(str(Path(__file__).parents[1]))

from tests.states import MemoryStates, bundle_of  # noqa: E402

LONG_FRAME_MS = 50.0
NUM_STEPS = 8
SIDES = {256: 6, 512: 3, 1024: 1}
"""Sides of the pictures and how many of them in ten."""
RECORD_FRAMES = """
  window.frames = []; window.longTasks = [];
  let before = null;
  const step = (now) => {
    if (before !== null) window.frames.push(now - before);
    before = now;
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
  new PerformanceObserver((list) => window.longTasks.push(...list.getEntries().map((entry) => entry.duration)))
    .observe({ type: "longtask" });
"""


class TimerExecutor:
    """Ranks that wait as long as the cost model says, and leave black pictures."""

    def __init__(self, num_ranks: int, cost: ProfileCost) -> None:
        self.ranks = frozenset(range(num_ranks))
        self._cost = cost
        self.states = MemoryStates()
        self.preview_bases: dict[str, TensorRef] = {}
        self.memory: dict[int, RankMemory] = {}
        self._on_event: OnEvent = lambda event: None

    def subscribe(self, on_event: OnEvent) -> None:
        self._on_event = on_event

    async def start(self, on_progress: Callable[[str], None]) -> None: ...

    def start_task(self, command: StartTask) -> None:
        task, request = command.task, command.work[0].request
        elapsed_s = task_s(self._cost, task, request)
        left = TensorRef(f"{request.request_id}.{task.stage}", 1)
        if task.stage == DECODE:
            black = np.zeros((request.shape.height, request.shape.width, 3), np.uint8)
            left = self.states.put(left.key, bundle_of(pixels=black))
        end = TaskFinished.planned(command, elapsed_s, left)
        asyncio.get_running_loop().call_later(elapsed_s, lambda: self._on_event(end))

    def forget(self, request_id: str) -> None:
        for ref in self.states.list(request_id):
            self.states.drop(ref)

    async def stop(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Load:
    """How large the pool is, and what it is asked for: `rate` requests per second, in Poisson arrivals."""

    policy: str
    num_ranks: int
    rate: float
    slow: float

    def engine(self) -> LiveEngine:
        shapes = tuple(Shape(side, side) for side in SIDES)
        card = ModelCard(
            name="timers", path=Path("timers"), family="flux", pipeline_class="FluxPipeline",
            execution=Execution("float32"), size_multiple=16,
            pixels_per_token=16, num_heads=16, num_text_tokens=64, default_num_steps=NUM_STEPS,
            default_guidance_scale=3.5, has_guidance=True, has_negative_prompt=True, sizes=shapes, fingerprint="timers",
        )  # fmt: skip
        degrees = tuple(degree for degree in (1, 2, 4, 8) if degree <= self.num_ranks)
        profile = Profile(
            model=card.name, hardware="timers", execution=Execution("float32"), source="made up", created="2026-01-01",
            switch_s=0.001,
            rows=(Row(stage=ENCODE, seconds=0.003 * self.slow), *tuple(
                Row(
                    stage=DENOISE, height=shape.height, width=shape.width, degree=degree,
                    tokens=FLUX.num_tokens(card, shape),
                    seconds=self.slow * (0.002 + shape.num_pixels * 3e-8 / degree**0.85),
                )
                for shape in shapes
                for degree in degrees
            ), *tuple(Row(stage=DECODE, height=s.height, width=s.width, seconds=0.003 * self.slow) for s in shapes)),
        )  # fmt: skip
        cost = ProfileCost(profile, lambda shape: card.valid_degrees(degrees))
        new_policy = partial(make_policy, self.policy, cost, num_ranks=self.num_ranks, shapes=shapes)
        engine = LiveEngine(
            Controller(new_policy(), cost), TimerExecutor(self.num_ranks, cost), [Intake(card=card, cost=cost)],
            Foresight(new_policy), max_queue=10_000, policy_name=self.policy,
        )  # fmt: skip
        engine.start()
        return engine

    async def send(self, engine: LiveEngine) -> None:
        """Arrivals without end, by a clock of their own: a late one delays no other."""
        dice = random.Random(0)
        due_s = engine.now
        pending: set[asyncio.Task[None]] = set()
        while True:
            due_s += dice.expovariate(self.rate)
            await asyncio.sleep(max(0.0, due_s - engine.now))
            (side,) = dice.choices(tuple(SIDES), tuple(SIDES.values()))
            generation = Generation(prompt="nothing", size=f"{side}x{side}", slo_s=self.slow * dice.uniform(0.2, 0.9))
            task = asyncio.create_task(self._ask(engine, generation))
            pending.add(task)
            task.add_done_callback(pending.discard)

    async def _ask(self, engine: LiveEngine, generation: Generation) -> None:
        with contextlib.suppress(TetriServeError):  # at the end the server goes away
            await engine.generate(generation)

    def serve(self) -> int:
        """In this process, until a signal comes; prints the URL."""
        sending: list[asyncio.Task[None]] = []

        async def launch() -> Jobs:
            engine = self.engine()
            sending.append(asyncio.create_task(self.send(engine)))
            return Jobs(engine)

        config = ServerConfig(port=0, shutdown_timeout_s=0.0)
        return run_server(config, launch, on_ready=lambda url, engine: print(url, flush=True))


def watch(url: str, seconds: float, prompt: str | None, picture: Path | None) -> None:
    """Look at the board for so long, and print how it went; then ask for a picture, and keep what is seen."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 960})
        page.goto(url)
        page.wait_for_selector("#connection[data-state=live]")
        ended = page.evaluate("parseInt(document.getElementById('sar-of').textContent.split(' of ')[1]) || 0")
        page.evaluate(RECORD_FRAMES)
        start = time.monotonic()
        page.wait_for_timeout(seconds * 1000)
        elapsed_s = time.monotonic() - start
        frames = sorted(page.evaluate("window.frames"))
        long_tasks = page.evaluate("window.longTasks")
        ended = page.evaluate("parseInt(document.getElementById('sar-of').textContent.split(' of ')[1]) || 0") - ended
        if prompt is not None:
            page.get_by_label("Prompt").fill(prompt)
            page.get_by_role("button", name="Draw it").click()
            page.wait_for_selector(".picture .verdict:not([hidden])")
        if picture is not None:
            page.screenshot(path=picture)
        browser.close()
    long = [frame for frame in frames if frame > LONG_FRAME_MS]
    at = statistics.quantiles(frames, n=100)
    print(f"{ended / elapsed_s:.1f} requests/s shown for {elapsed_s:.0f} s, {len(frames) / elapsed_s:.0f} frames/s")
    print(f"frame p50 {at[49]:.1f} ms, p95 {at[94]:.1f} ms, p99 {at[98]:.1f} ms, longest {frames[-1]:.1f} ms")
    print(f"frames above {LONG_FRAME_MS:g} ms: {len(long)} of {len(frames)}; scripts above 50 ms: {len(long_tasks)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=60.0, help="requests per second")
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--policy", default="edf")
    parser.add_argument("--slow", type=float, default=1.0, help="every stage takes so many times longer")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--url", help="look at this server instead of a pool of timers")
    parser.add_argument("--prompt", help="at the end ask for this picture")
    parser.add_argument("--picture", type=Path, help="screenshot at the end")
    parser.add_argument("--serve", action="store_true", help="serve until Ctrl-C and print the URL")
    arguments = parser.parse_args()
    if arguments.serve:
        load = Load(policy=arguments.policy, num_ranks=arguments.ranks, rate=arguments.rate, slow=arguments.slow)
        return load.serve()
    if arguments.url is not None:
        watch(arguments.url, arguments.seconds, arguments.prompt, arguments.picture)
        return 0
    command = [sys.executable, __file__, "--serve", *sys.argv[1:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            watch(server.stdout.readline().strip(), arguments.seconds, arguments.prompt, arguments.picture)
        finally:
            server.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
