"""What happens at five times the capacity: a calm phase, a burst, and a calm phase again, on real processes.

Starts `tetriserve serve` with the bundled model, measures what it can do (a closed loop of best-effort requests), and
sends Poisson arrivals at `--calm` and `--burst` times that, whatever becomes of those before. Once with every client
saying `deadline_policy: reject`, once with none. Judged by the client's clock. Exit code 1 if a bar is broken:

- every answer is an image, a 429 with Retry-After, or none within the client's own timeout;
- at most `--max-queue` images wait, and for a moment between tasks those that run;
- memory of all the server's processes grows by at most a tenth from the burst's first half to the end;
- under `reject`, more than 90 % of what is accepted during the burst is in time;
- a refusal takes less than a second, 99 times of 100;
- within 10 s after the burst the share in time is back at what it was before.

With `--timers` the ranks are timers (`timed_server.py`), whose speed hardly depends on what else the machine runs; all
else is the same. Run with

    python benchmarks/overload.py [--timers] [--calm 0.5] [--burst 5] [--seconds 20] [--policy tetriserve]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from policies_live import alone_times, free_port, running
from rich.console import Console
from rich.table import Table
from timed_server import PROFILE

from tetriserve.config import PoolConfig
from tetriserve.core.request import Shape
from tetriserve.launch import StartProgress, measure_profile
from tetriserve.profile.table import Profile, load_profile, save_profile
from tetriserve.workload.arrivals import Poisson
from tetriserve.workload.mixes import Mix, parse_mix

MAX_GROWTH = 1.10
MIN_SAR = 0.90
MAX_REFUSAL_S = 1.0
MAX_RECOVERY_S = 10.0
WINDOW_S = 5.0
"""Over which the share in time is looked at after the burst."""
NORMAL = 0.9
"""Recovered: a window's share in time is this much of the first calm phase's."""
MAX_REQUESTS = 3000
START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Sent:
    """One request and its answer. kind: image, 429, timeout, or what else it was. Seconds since the run's start."""

    at_s: float
    slo_s: float
    took_s: float
    kind: str

    @property
    def is_in_time(self) -> bool:
        return self.kind == "image" and self.took_s <= self.slo_s


@dataclass(frozen=True)
class Sample:
    """The server at one moment."""

    at_s: float
    num_waiting: int
    memory_mb: float


@dataclass(frozen=True)
class Phase:
    name: str
    start_s: float
    end_s: float
    rate_per_s: float


class Target:
    """One server under load."""

    def __init__(self, port: int, pid: int, timeout_s: float) -> None:
        self._port = port
        self._pid = pid
        self._timeout_s = timeout_s

    async def draw(self, shape: Shape, num_steps: int, slo_s: float, policy: str, seed: int) -> tuple[str, float]:
        """What a request came to, and the seconds it took."""
        body = json.dumps(
            {"prompt": f"a red circle, number {seed}", "size": str(shape), "seed": seed,
             "num_inference_steps": num_steps, "slo_ms": slo_s * 1000, "deadline_policy": policy}
        ).encode()  # fmt: skip
        start_s = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                head, content = await self._exchange("POST /v1/images/generations", body)
        except TimeoutError:
            return "timeout", time.monotonic() - start_s
        except OSError as error:
            return type(error).__name__, time.monotonic() - start_s
        took_s = time.monotonic() - start_s
        status = head.split(b" ", 2)[1].decode() if head.startswith(b"HTTP/1.1 ") else "no answer"
        if status == "200":
            return "image" if json.loads(content)["data"][0]["b64_json"] else "no image", took_s
        if status == "429" and not re.search(rb"\r\nretry-after: [1-9]\d*\r\n", head.lower() + b"\r\n"):
            return "429 without Retry-After", took_s
        return status, took_s

    async def sample(self, now_s: float) -> Sample:
        _, content = await self._exchange("GET /metrics", b"")
        waiting = re.search(rb"^tetriserve_requests_waiting (\S+)", content, re.MULTILINE)
        assert waiting is not None, "/metrics says how many wait"
        return Sample(now_s, int(float(waiting[1])), sum(map(_memory_mb, _family(self._pid))))

    async def is_ready(self) -> bool:
        try:
            head, _ = await self._exchange("GET /ready", b"")
        except OSError:
            return False
        if not head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 503")):
            raise SystemExit(f"/ready answered {head[:40]!r}")
        return head.startswith(b"HTTP/1.1 200")

    async def _exchange(self, line: str, body: bytes) -> tuple[bytes, bytes]:
        """Head and content of an answer, over a connection of its own."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            head = f"{line} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
            writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            answer = await reader.read(-1)
        finally:
            writer.close()
        start, _, content = answer.partition(b"\r\n\r\n")
        return start, content


def _family(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from _family(int(child))


def _memory_mb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return 0.0  # it just ended


@dataclass(frozen=True)
class Load:
    """What is asked for. slo_s: the deadline of each size."""

    mix: Mix
    slo_s: dict[Shape, float]
    num_steps: int
    policy: str
    seed: int


async def measure_capacity(target: Target, load: Load, num_clients: int, seconds: float) -> float:
    """Images per second in a closed loop of best-effort requests, after one of each size to warm up."""
    source = random.Random(load.seed)
    for shape in load.mix.shapes:
        await target.draw(shape, load.num_steps, 60.0, "best_effort", 0)
    end_s = time.monotonic() + seconds
    ends: list[float] = []

    async def client() -> None:
        while time.monotonic() < end_s:
            kind, _ = await target.draw(load.mix.draw(source), load.num_steps, 60.0, "best_effort", len(ends))
            if kind != "image":
                raise SystemExit(f"a request of the capacity measurement ended as {kind}")
            ends.append(time.monotonic())

    start_s = time.monotonic()
    await asyncio.gather(*(client() for _ in range(num_clients)))
    return len(ends) / (max(ends) - start_s)


async def drive(target: Target, load: Load, phases: Sequence[Phase]) -> tuple[list[Sent], list[Sample]]:
    """Send every phase's requests when they are due, and sample the server once a second until all are answered."""
    source = random.Random(load.seed)
    arrivals = [
        (phase.start_s + at_s, load.mix.draw(source))
        for phase in phases
        for at_s in _times(source, phase.rate_per_s, phase.end_s - phase.start_s)
    ]
    if len(arrivals) > MAX_REQUESTS:
        raise SystemExit(f"{len(arrivals)} requests; at most {MAX_REQUESTS}: shorten --seconds")
    start_s = time.monotonic()
    sent: list[Sent] = []
    samples: list[Sample] = []

    async def draw(at_s: float, shape: Shape, seed: int) -> None:
        await asyncio.sleep(start_s + at_s - time.monotonic())
        kind, took_s = await target.draw(shape, load.num_steps, load.slo_s[shape], load.policy, seed)
        sent.append(Sent(at_s, load.slo_s[shape], took_s, kind))

    async def watch() -> None:
        while True:
            samples.append(await target.sample(time.monotonic() - start_s))
            await asyncio.sleep(1.0)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(draw(at_s, shape, seed) for seed, (at_s, shape) in enumerate(arrivals)))
    watching.cancel()
    samples.append(await target.sample(time.monotonic() - start_s))
    return sorted(sent, key=lambda one: one.at_s), samples


def _times(source: random.Random, rate_per_s: float, seconds: float) -> Iterator[float]:
    for at_s in Poisson(rate_per_min=60 * rate_per_s).times(source):
        if at_s >= seconds:
            return
        yield at_s


def _during(sent: Sequence[Sent], start_s: float, end_s: float) -> list[Sent]:
    return [one for one in sent if start_s <= one.at_s < end_s]


def _share_in_time(sent: Sequence[Sent]) -> float:
    return sum(one.is_in_time for one in sent) / len(sent) if sent else 1.0


def _accepted(sent: Sequence[Sent]) -> list[Sent]:
    return [one for one in sent if one.kind in ("image", "timeout")]


def recovery_s(sent: Sequence[Sent], calm: Phase, after: Phase) -> float:
    """When, after the burst, a window begins in which the share in time of all that is sent is back to normal."""
    normal = NORMAL * _share_in_time(_during(sent, calm.start_s, calm.end_s))
    start_s = after.start_s
    while start_s + WINDOW_S <= after.end_s:
        if _share_in_time(_during(sent, start_s, start_s + WINDOW_S)) >= normal:
            return start_s - after.start_s
        start_s += 1.0
    return after.end_s - after.start_s


def print_phases(title: str, sent: Sequence[Sent], samples: Sequence[Sample], phases: Sequence[Phase]) -> None:
    table = Table(title=title, title_justify="left")
    for heading in ("phase", "sent", "images", "429", "timeout", "other", "SAR of accepted", "p50 s", "p99 s",
                    "429 p99 s", "max queue", "memory MB"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    for phase, following in pairwise((*phases, Phase("end", float("inf"), 0.0, 0.0))):
        mine = _during(sent, phase.start_s, phase.end_s)
        seen = [sample for sample in samples if phase.start_s <= sample.at_s < following.start_s]
        kinds = Counter(one.kind for one in mine)
        images = [one.took_s for one in mine if one.kind == "image"]
        refusals = [one.took_s for one in mine if one.kind == "429"]
        table.add_row(
            phase.name,
            str(len(mine)),
            *(str(kinds.pop(kind, 0)) for kind in ("image", "429", "timeout")),
            ", ".join(f"{number} {kind}" for kind, number in kinds.items()) or "0",
            f"{_share_in_time(_accepted(mine)):.3f}",
            *(f"{_quantile(images, q):.2f}" for q in (0.5, 0.99)),
            f"{_quantile(refusals, 0.99):.2f}",
            str(max((sample.num_waiting for sample in seen), default=0)),
            f"{max((sample.memory_mb for sample in seen), default=0.0):.0f}",
        )
    Console(highlight=False, width=140).print(table)


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else 0.0


def broken_bars(
    sent: Sequence[Sent], samples: Sequence[Sample], phases: Sequence[Phase], policy: str, most: int
) -> list[str]:
    """What does not hold, each in a line."""
    calm, burst, after = phases
    in_burst = _during(sent, burst.start_s, burst.end_s)
    refusals = [one.took_s for one in sent if one.kind == "429"]
    others = Counter(one.kind for one in sent if one.kind not in ("image", "429", "timeout"))
    half_s = (burst.start_s + burst.end_s) / 2
    early_mb = max(sample.memory_mb for sample in samples if sample.at_s < half_s)
    late_mb = max(sample.memory_mb for sample in samples if sample.at_s >= half_s)
    longest = max(sample.num_waiting for sample in samples)
    sar, refusal_s = _share_in_time(_accepted(in_burst)), _quantile(refusals, 0.99)
    back_s = recovery_s(sent, calm, after)
    print(f"recovered {back_s:.0f} s after the burst; {early_mb:.0f} MB until its middle, {late_mb:.0f} MB afterwards")
    bars = {
        f"other answers: {dict(others)}": not others,
        f"{longest} images waited, of at most {most}": longest <= most,
        f"memory grew from {early_mb:.0f} to {late_mb:.0f} MB": late_mb <= MAX_GROWTH * early_mb,
        f"SAR of what was accepted is {sar:.3f}": policy != "reject" or sar > MIN_SAR,
        f"a refusal took {refusal_s:.2f} s": refusal_s < MAX_REFUSAL_S,
        f"recovery took {back_s:.0f} s": back_s <= MAX_RECOVERY_S,
    }
    return [line for line, holds in bars.items() if not holds]


async def run(port: int, pid: int, profile: Profile, options: argparse.Namespace) -> list[str]:
    target = Target(port, pid, options.timeout)
    async with asyncio.timeout(START_TIMEOUT_S):
        while not await target.is_ready():
            await asyncio.sleep(0.3)
    mix = parse_mix(options.mix, profile.shapes)
    alone_s = alone_times(profile, mix.shapes, options.steps)
    slo_s = {shape: options.slo_multiple * seconds for shape, seconds in alone_s.items()}
    broken: list[str] = []
    capacity = options.capacity
    for policy in options.deadline_policies:
        load = Load(mix, slo_s, options.steps, policy, options.seed)
        if capacity is None:
            capacity = await measure_capacity(target, load, 2 * options.ranks, options.seconds)
        phases = [
            Phase("calm", 0.0, options.seconds, options.calm * capacity),
            Phase("burst", options.seconds, 2 * options.seconds, options.burst * capacity),
            Phase("calm again", 2 * options.seconds, 4 * options.seconds, options.calm * capacity),
        ]
        sent, samples = await drive(target, load, phases)
        title = f"{policy}: {options.policy}, capacity {capacity:.2f} images/s, burst {options.burst:g} x, "
        print_phases(f"{title}deadlines {options.slo_multiple:g} x alone", sent, samples, phases)
        most = options.max_queue + options.ranks
        broken += [f"{policy}: {line}" for line in broken_bars(sent, samples, phases, policy, most)]
    return broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timers", action="store_true", help="ranks that only take their time")
    parser.add_argument("--policy", default="tetriserve", help="of the scheduler")
    parser.add_argument("--deadline-policies", nargs="+", default=["reject", "best_effort"])
    parser.add_argument("--mix", default="256x256:3,512x512:1")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--calm", type=float, default=0.5, help="arrivals over capacity")
    parser.add_argument("--burst", type=float, default=5.0, help="arrivals over capacity")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a phase; the last one takes twice as long")
    parser.add_argument("--capacity", type=float, help="images per second, instead of measuring it")
    parser.add_argument("--slo-multiple", type=float, default=3.0, help="deadline over the time alone at degree 1")
    parser.add_argument("--max-queue", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds that a client waits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", type=Path, help="use this profile instead of measuring one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        log, port = Path(directory) / "server.log", free_port()
        if options.timers:
            profile, options.mix, options.ranks = PROFILE, "128x128:3,256x256:1", 2
            command = [sys.executable, str(Path(__file__).with_name("timed_server.py"))]
        else:
            path = options.profile or Path(directory) / "profile.json"
            if options.profile is None:
                quiet, pool = StartProgress(step=lambda text: None), PoolConfig(num_ranks=options.ranks)
                save_profile(asyncio.run(measure_profile(None, pool, (), quiet))[1], path)
            profile = load_profile(path)
            command = [sys.executable, "-c", "from tetriserve.cli import main; main()", "serve", "--profile", str(path)]
            command += ["--ranks", str(options.ranks)]
        command += ["--port", str(port), "--policy", options.policy, "--max-queue", str(options.max_queue)]
        with running(command, log) as process:
            broken = asyncio.run(run(port, process.pid, profile, options))
        if "Traceback" in log.read_text():
            broken.append(f"the server's log has a traceback: {log.read_text()[-2000:]}")
    print("\n".join(f"broken: {line}" for line in broken) or "all bars hold")
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    main()
