"""What the control plane sustains: the live server with timers as ranks, under load from a second process.

HTTP side, engine and policies are the real ones; a task only takes the time that the profile says, and leaves a picture
that was made before. Clients ask again as soon as they are answered, `--clients` of them for each rank, so that there
is always a queue. Per pool: task ends a second; lag of the server's event loop (how late a sleep of 5 ms ends); time
until `/health` answers, asked by a third process every 20 ms; share of the time that the policy takes. Bars: 256 ranks
under `lookahead` at least 350 task ends a second, lag and `/health` p99 at most 50 ms; 64 ranks lag p99 at most 20 ms.
Server and load take a core each. Run with

    python benchmarks/control_plane.py [--ranks 8 64 256 1024] [--policies lookahead tetriserve] [--seconds 10]
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from timed_server import profile_of

from tests.states import MemoryStates, bundle_of  # noqa: E402
from tetriserve.config import ServerConfig  # noqa: E402
from tetriserve.control import Controller  # noqa: E402
from tetriserve.control.foresight import Foresight  # noqa: E402
from tetriserve.core.cost import task_s  # noqa: E402
from tetriserve.core.events import StartTask, TaskFinished, TensorRef  # noqa: E402
from tetriserve.core.execution import Execution  # noqa: E402
from tetriserve.core.memory import RankMemory  # noqa: E402
from tetriserve.core.plan import Plan, State  # noqa: E402
from tetriserve.core.request import Shape  # noqa: E402
from tetriserve.core.stages import DECODE  # noqa: E402
from tetriserve.engine import Intake, Jobs, LiveEngine  # noqa: E402
from tetriserve.executor.protocol import OnEvent  # noqa: E402
from tetriserve.models.card import ModelCard  # noqa: E402
from tetriserve.policies import Policy, make_policy  # noqa: E402
from tetriserve.profile.cost import ProfileCost  # noqa: E402
from tetriserve.server import run_server  # noqa: E402
from tetriserve.workload.outcome import Outcome  # noqa: E402

NUM_STEPS = 20
STEP_S = {64: 0.05, 128: 0.12, 256: 0.4}
"""Seconds per step at degree 1 by side."""
SPEEDUPS = {1: 1.0, 2: 1.8, 4: 3.2, 8: 5.6}
SLO_SCALE = (1.5, 8.0)
"""Deadlines, in times alone at degree 1: some can be met only by several ranks, some not at all."""
PROBE_EVERY_S = 0.02
SLEEP_S = 0.005
BARS = {256: (350.0, 50.0, 50.0), 64: (0.0, 20.0, float("inf"))}
"""Under `lookahead`, by ranks: the least task ends a second; p99 of the lag and of `/health` in ms at most."""
CARD = ModelCard(
    name="timers", path=Path("timers"), family="flux", pipeline_class="FluxPipeline", execution=Execution("float32"),
    size_multiple=16, pixels_per_token=16, num_heads=16, num_text_tokens=64, default_num_steps=NUM_STEPS,
    default_guidance_scale=3.5, has_guidance=True, has_negative_prompt=True,
    sizes=tuple(Shape(side, side) for side in STEP_S), fingerprint="timers",
)  # fmt: skip
PROFILE = profile_of(CARD, STEP_S, SPEEDUPS, encode_s=0.02, decode_s=0.05)


class TimerExecutor:
    """Ranks that wait as long as the cost model says, a tenth more or less."""

    def __init__(self, num_ranks: int, cost: ProfileCost) -> None:
        self.ranks = frozenset(range(num_ranks))
        self.states = MemoryStates()
        self.preview_bases: dict[str, TensorRef] = {}
        self.memory: dict[int, RankMemory] = {}
        self._cost = cost
        self._dice = random.Random(0)
        self._on_event: OnEvent = lambda event: None
        self._pictures = {side: _picture(side) for side in STEP_S}

    def subscribe(self, on_event: OnEvent) -> None:
        self._on_event = on_event

    async def start(self, on_progress: Callable[[str], None]) -> None: ...

    def start_task(self, command: StartTask) -> None:
        task, request = command.task, command.work[0].request
        elapsed_s = task_s(self._cost, task, request) * max(0.5, self._dice.gauss(1, 0.1))
        left = TensorRef(f"{request.request_id}.{task.stage}", 1)
        if task.stage == DECODE:
            left = self.states.put(left.key, self._pictures[request.shape.height])
        asyncio.get_running_loop().call_later(elapsed_s, self._end, TaskFinished.planned(command, elapsed_s, left))

    def _end(self, event: TaskFinished) -> None:
        self._on_event(event)

    def forget(self, request_id: str) -> None:
        self.states.drop(TensorRef(f"{request_id}.{DECODE}", 1))

    async def stop(self) -> None: ...


def _picture(side: int) -> bytes:
    ramp = np.linspace(0, 255, side)
    pixels = np.stack([np.add.outer(ramp, ramp) / 2, np.tile(ramp, (side, 1)), np.tile(ramp[:, None], side)], axis=-1)
    return bundle_of(pixels=pixels.astype(np.uint8))


class TimedPolicy:
    """`policy`, with a note of when it planned and for how long: monotonic seconds."""

    def __init__(self, policy: Policy) -> None:
        self.batching = getattr(policy, "batching", False)
        self._policy = policy
        self.plans: list[tuple[float, float]] = []

    def plan(self, state: State, now: float) -> Plan:
        start_s = time.monotonic()
        plan = self._policy.plan(state, now)
        self.plans.append((start_s, time.monotonic() - start_s))
        return plan


def serve(policy: str, num_ranks: int, port: int, notes: Path) -> int:
    """The server, until SIGTERM; what it noted is in `notes` then."""
    cost = ProfileCost(PROFILE, lambda shape: CARD.valid_degrees(tuple(SPEEDUPS)))
    new_policy = partial(make_policy, policy, cost, num_ranks=num_ranks, shapes=PROFILE.shapes)
    timed = TimedPolicy(new_policy())
    lags: list[tuple[float, float]] = []
    ends: list[float] = []
    outcomes: list[tuple[float, bool]] = []

    def observe(observation: object) -> None:
        if isinstance(observation, Outcome):
            outcomes.append((time.monotonic(), observation.is_attained))

    async def watch_loop() -> None:
        while True:
            start_s = time.monotonic()
            await asyncio.sleep(SLEEP_S)
            lags.append((start_s, time.monotonic() - start_s - SLEEP_S))

    class CountingExecutor(TimerExecutor):
        def _end(self, event: TaskFinished) -> None:
            ends.append(time.monotonic())
            super()._end(event)

    watching: list[asyncio.Task[None]] = []

    async def launch() -> Jobs:
        engine = LiveEngine(
            Controller(timed, cost), CountingExecutor(num_ranks, cost), [Intake(card=CARD, cost=cost)],
            Foresight(new_policy), max_queue=100_000, policy_name=policy, observer=observe,
        )  # fmt: skip
        engine.start()
        watching.append(asyncio.create_task(watch_loop()))
        return Jobs(engine)

    code = run_server(
        ServerConfig(port=port, shutdown_timeout_s=0.0), launch, on_ready=lambda url, engine: print("ready", flush=True)
    )
    notes.write_text(json.dumps({"lags": lags, "ends": ends, "outcomes": outcomes, "plans": timed.plans}))
    return code


async def load(port: int, num_clients: int) -> None:
    """Clients that each ask again as soon as they are answered, without end."""
    alone_s = {side: NUM_STEPS * step_s for side, step_s in STEP_S.items()}

    async def client(number: int) -> None:
        dice = random.Random(number)
        await asyncio.sleep(dice.uniform(0, 3))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while True:
            (side,) = dice.choices((*STEP_S,), (5, 3, 2))
            slo_ms = 1e3 * dice.uniform(*SLO_SCALE) * alone_s[side]
            body = json.dumps({"prompt": f"number {number}", "size": f"{side}x{side}", "slo_ms": slo_ms}).encode()
            writer.write(
                b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))

    print("loading", flush=True)
    await asyncio.gather(*map(client, range(num_clients)))


def probe(port: int, until_s: float) -> list[float]:
    """Seconds until `/health` answered, one after the other."""
    took = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while (start_s := time.monotonic()) < until_s:
        connection.request("GET", "/health")
        connection.getresponse().read()
        took.append(time.monotonic() - start_s)
        time.sleep(PROBE_EVERY_S)
    return took


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else float("nan")


def measure(policy: str, num_ranks: int, options: argparse.Namespace) -> bool:
    """Measure one pool and print it; whether the bars hold."""
    with tempfile.TemporaryDirectory() as directory:
        notes, port = Path(directory) / "notes.json", free_port()
        command = [sys.executable, __file__, "--port", str(port), "--policies", policy, "--ranks", str(num_ranks)]
        with (Path(directory) / "log").open("wb") as log:
            server = subprocess.Popen([*command, "--serve", str(notes)], stdout=subprocess.PIPE, stderr=log)
            assert server.stdout is not None
            server.stdout.readline()
            loading = [*command, "--load", str(options.clients * num_ranks)]
            client = subprocess.Popen(loading, stdout=subprocess.PIPE, stderr=log)
            assert client.stdout is not None
            try:
                client.stdout.readline()
                time.sleep(options.warm_up)
                start_s = time.monotonic()
                end_s = start_s + options.seconds
                healths = probe(port, end_s)
            finally:
                client.terminate()
                client.wait()
                server.terminate()
                server.wait()
        if not notes.exists():
            last = (Path(directory) / "log").read_text().strip().splitlines()[-1:]
            print(f"{policy:>10} {num_ranks:5}  the server did not stop by itself: {last}  MISSED", flush=True)
            return False
        noted = json.loads(notes.read_text())
    seconds = options.seconds
    lags = [1e3 * lag for at, lag in noted["lags"] if start_s <= at < end_s]
    num_ends = sum(start_s <= at < end_s for at in noted["ends"])
    plans = [took for at, took in noted["plans"] if start_s <= at < end_s]
    attained = [ok for at, ok in noted["outcomes"] if start_s <= at < end_s]
    health_ms = [1e3 * took for took in healths]
    per_s, lag_ms, health_p99 = num_ends / seconds, quantile(lags, 0.99), quantile(health_ms, 0.99)
    least, most_lag, most_health = BARS.get(num_ranks, (0.0, float("inf"), float("inf")))
    is_held = policy != "lookahead" or (per_s >= least and lag_ms <= most_lag and health_p99 <= most_health)
    print(
        f"{policy:>10} {num_ranks:5}  {per_s:8.0f}  {quantile(lags, 0.5):7.1f} / {lag_ms:7.1f}  "
        f"{quantile(health_ms, 0.5):7.1f} / {health_p99:7.1f}  {len(plans) / seconds:7.0f}  "
        f"{1e3 * quantile(plans, 0.5):6.1f} / {1e3 * quantile(plans, 0.99):6.1f}  {sum(plans) / seconds:6.0%}  "
        f"{sum(attained) / max(1, len(attained)):6.0%}  {'' if is_held else 'MISSED'}",
        flush=True,
    )
    return is_held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", nargs="+", default=["lookahead", "tetriserve"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 256, 1024])
    parser.add_argument("--clients", type=int, default=4, help="for each rank")
    parser.add_argument("--warm-up", type=float, default=7.0, help="seconds under load before it counts")
    parser.add_argument("--seconds", type=float, default=10.0, help="that count")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--load", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        return serve(options.policies[0], options.ranks[0], options.port, options.serve)
    if options.load is not None:
        asyncio.run(load(options.port, options.load))
    print(
        f"{'policy':>10} {'ranks':>5}  ends / s  lag p50 / p99, ms  health p50/p99, ms  plans/s  plan p50/p99, ms  "
        "policy  SAR"
    )
    held = [measure(policy, num_ranks, options) for policy in options.policies for num_ranks in options.ranks]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
