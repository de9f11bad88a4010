"""Does accepted work survive the server? It is killed again and again, in the middle of a mixed load.

Clients send requests under idempotency keys and retry each until it is answered; some leave early and come back, some
want a stream, some two images, some leave the seed to the server. Meanwhile the whole process group of the server is
killed (SIGKILL) at random moments and started again on the same port and journal. In the end every key is asked once
more, and every image is compared with that of an undisturbed request. Bars: every request is answered, by the right
image (within 1/255), and a key never has two answers that differ. Exit code 1: a bar is missed. Run with

    python benchmarks/server_kills.py [--kills 50] [--clients 6] [--seed 1]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from tetriserve.profiles import BUNDLED_PROFILES
from tetriserve.server.run import listen

PROFILE = BUNDLED_PROFILES / "tetriserve-tiny.2-epyc-cores.2-ranks.json"
PROMPTS = ("a red circle", "a blue square", "a green triangle above a yellow circle", "two red squares")
TOLERANCE = 1
READY_S = 120.0
PATH = "/v1/images/generations"
Answer = list[dict[str, Any]]


@dataclass
class Job:
    """What one client wants under one key, and every answer that it ever got."""

    key: str
    body: dict[str, Any]
    leaves_after_s: float | None
    answers: list[Answer] = field(default_factory=list)
    refusals: Counter[int] = field(default_factory=Counter)

    @property
    def has_two_answers(self) -> bool:
        """Whether any two of its answers differ, in an image or in how it came about."""
        return any(answer != self.answers[0] for answer in self.answers)


class Server:
    """The server under test: one port and one journal, any number of lives."""

    def __init__(self, directory: Path) -> None:
        with listen("127.0.0.1", 0) as listener:
            self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.journal = directory / "journal"
        self.log = directory / "server.log"
        self.ready_s: list[float] = []
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start, and wait until it is ready."""
        started_at = time.monotonic()
        command = ["serve", "--port", str(self.port), "--journal", str(self.journal), "--profile", str(PROFILE)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from tetriserve.cli import main; main()", *command],
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        async with httpx.AsyncClient() as client:
            while True:
                try:
                    if (await client.get(f"{self.url}/ready", timeout=5)).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                if self._process.poll() is not None or time.monotonic() > started_at + READY_S:
                    raise SystemExit(f"the server did not start; see {self.log}")
                await asyncio.sleep(0.05)
        self.ready_s.append(time.monotonic() - started_at)

    def kill(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> int:
        """In good order; the exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait()

    async def counters(self) -> Counter[str]:
        """The journal's metrics in this life."""
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"{self.url}/metrics", timeout=10)).text
        counters: Counter[str] = Counter()
        for line in text.splitlines():
            if line.startswith("tetriserve_journal_"):
                name, value = line.rsplit(" ", 1)
                counters[name.split("{")[0]] += int(float(value))
        return counters


class Load:
    """Clients that want pictures until told to stop; then each finishes the job that it is at."""

    def __init__(self, url: str, dice: random.Random) -> None:
        self._url = f"{url}{PATH}"
        self._dice = dice
        self.jobs: list[Job] = []
        self.is_over = False

    async def client(self) -> None:
        while not self.is_over:
            job = self._new_job()
            self.jobs.append(job)
            await self.finish(job)
            if self._dice.random() < 0.3:
                await self.finish(job)  # a client that lost the answer

    def _new_job(self) -> Job:
        dice = self._dice
        side, num_steps = (512, dice.choice((4, 8))) if dice.random() < 0.25 else (256, dice.choice((4, 8, 16)))
        body: dict[str, Any] = {
            "prompt": dice.choice(PROMPTS), "size": f"{side}x{side}", "num_inference_steps": num_steps,
            "slo_ms": dice.choice((2000, 10_000, 60_000)),
        }  # fmt: skip
        if dice.random() < 0.9:
            body["seed"] = dice.randrange(3)
        if dice.random() < 0.15:
            body["n"] = 2
        if dice.random() < 0.15:
            body["stream"] = True
        return Job(f"job-{len(self.jobs)}", body, dice.uniform(0.05, 0.5) if dice.random() < 0.15 else None)

    async def finish(self, job: Job) -> None:
        """Ask until there is an answer: an image, or a failure that is final."""
        timeout_s = job.leaves_after_s or 60.0
        async with httpx.AsyncClient() as client:
            while True:
                try:
                    answer = await self._ask(client, job, timeout_s)
                except (httpx.HTTPError, ConnectionError):
                    answer = None
                if answer is not None:
                    job.answers.append(answer)
                    return
                timeout_s = 60.0
                await asyncio.sleep(0.1)

    async def _ask(self, client: httpx.AsyncClient, job: Job, timeout_s: float) -> Answer | None:
        response = await client.post(self._url, json=job.body, headers={"Idempotency-Key": job.key}, timeout=timeout_s)
        if response.status_code in (429, 503):
            job.refusals[response.status_code] += 1
            return None
        if response.status_code != 200:
            return [response.json()]
        if not job.body.get("stream"):
            return [picked(item) for item in response.json()["data"]]
        events = [json.loads(block.split("data: ", 1)[1]) for block in response.text.split("\n\n") if "data: " in block]
        images = {e["image_index"]: picked(e) for e in events if e["type"] == "image_generation.completed"}
        if len(images) < (job.body.get("n") or 1):
            return None  # the stream ended early: the server was killed, or says that it stops
        return [images[number] for number in sorted(images)]


def picked(item: dict[str, Any]) -> dict[str, Any]:
    return {name: item[name] for name in ("b64_json", "seed", "schedule")}


def pixels_of(image: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))).astype(int)


async def count_wrong(url: str, jobs: list[Job]) -> tuple[int, int]:
    """Images that differ by more than the tolerance from an undisturbed request's, and how many were compared."""
    undisturbed: dict[tuple[Any, ...], np.ndarray] = {}
    num_wrong = num_compared = 0
    async with httpx.AsyncClient(timeout=60) as client:
        for job in jobs:
            for image in job.answers[0] if job.answers else []:
                if "b64_json" not in image:
                    continue  # a failure, which has a line of its own
                num_compared += 1
                body = {name: job.body[name] for name in ("prompt", "size", "num_inference_steps")}
                body["seed"] = image["seed"]
                key = tuple(body.values())
                if key not in undisturbed:
                    response = await client.post(f"{url}{PATH}", json=body)
                    undisturbed[key] = pixels_of(response.json()["data"][0])
                num_wrong += int(np.abs(pixels_of(image) - undisturbed[key]).max() > TOLERANCE)
    return num_wrong, num_compared


async def run(options: argparse.Namespace, directory: Path, console: Console) -> bool:
    dice = random.Random(options.seed)
    server = Server(directory)
    await server.start()
    load = Load(server.url, dice)
    clients = [asyncio.create_task(load.client()) for _ in range(options.clients)]
    totals: Counter[str] = Counter()
    kill_dice = random.Random(options.seed + 1)
    for number in range(options.kills):
        await asyncio.sleep(kill_dice.uniform(0.2, options.longest_life))
        totals += await server.counters()
        server.kill()
        await server.start()
        console.print(
            f"kill {number + 1}: ready after {server.ready_s[-1]:.1f} s, {len(load.jobs)} jobs", highlight=False
        )
    load.is_over = True
    _, unanswered = await asyncio.wait(clients, timeout=options.patience)
    for client in unanswered:
        client.cancel()
    if not unanswered:
        for job in load.jobs:
            await load.finish(job)
    num_wrong, num_compared = await count_wrong(server.url, load.jobs)
    totals += await server.counters()
    exit_code = server.stop()
    return report(options, server, load, totals, num_wrong, num_compared, exit_code, console)


def report(
    options: argparse.Namespace, server: Server, load: Load, totals: Counter[str], num_wrong: int, num_compared: int,
    exit_code: int, console: Console,
) -> bool:  # fmt: skip
    """Print the verdict; whether every bar was met."""
    jobs = load.jobs
    num_lost = sum(not job.answers for job in jobs)
    num_failed = sum("error" in job.answers[0][0] for job in jobs if job.answers)
    num_twice = sum(job.has_two_answers for job in jobs)
    ready_s = server.ready_s[1:] or server.ready_s
    table = Table(title=f"{options.kills} kills of the server, seed {options.seed}", show_header=False)
    for name, value in (
        ("requests (keys)", len(jobs)),
        ("answered", len(jobs) - num_lost),
        ("lost", num_lost),
        ("answered by a failure", num_failed),
        ("answers, repeats included", sum(len(job.answers) for job in jobs)),
        ("keys with two different answers", num_twice),
        ("images compared", num_compared),
        ("wrong images", num_wrong),
        ("images resumed", totals["tetriserve_journal_resumed_total"]),
        ("steps not done again", totals["tetriserve_journal_steps_saved_total"]),
        ("answers from the journal", totals["tetriserve_journal_replays_total"]),
        ("corrupt records or files", totals["tetriserve_journal_corrupt_total"]),
        ("journal errors", totals["tetriserve_journal_errors_total"]),
        ("start to ready, median / longest", f"{statistics.median(ready_s):.1f} s / {max(ready_s):.1f} s"),
        ("exit code in the end", exit_code),
    ):
        table.add_row(name, str(value))
    console.print(table)
    return not (num_lost or num_failed or num_twice or num_wrong or exit_code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=None, help="made up and printed if not given")
    parser.add_argument("--longest-life", type=float, default=5.0, help="seconds from ready to a kill, at most")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds that the last answers may take")
    parser.add_argument(
        "--keep", type=Path, help="folder for the journal and the server's log; a temporary one if none"
    )
    options = parser.parse_args()
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(10**6)
    console = Console(width=100)
    console.print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        return 0 if asyncio.run(run(options, directory, console)) else 1


if __name__ == "__main__":
    sys.exit(main())
