"""What the bundled model costs: a step, a whole picture on one core, and a server's memory.

Draws on one rank with one thread, then starts `tetriserve serve` with two ranks, has it draw every size, and adds up
its processes (PSS: pages that several share are counted once). Bars, all at 256x256 on one core: a step at most 0.15 s,
a default picture with its decode at most 4 s; the server of two ranks at most 1.5 GB. Run with

    python benchmarks/first_picture.py [--pictures 10]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tetriserve import Engine
from tetriserve.core.stages import DENOISE

SIZES = ("256x256", "512x512", "1024x1024")
PROMPT = "a red circle above a blue square on a white background"
STEP_BAR_S, PICTURE_BAR_S, MEMORY_BAR_GB = 0.15, 4.0, 1.5
START_TIMEOUT_S = 300.0


def time_pictures(num_pictures: int) -> None:
    with Engine(ranks=1, policy="fixed:1") as engine:
        for size in SIZES:
            engine.generate(PROMPT, size=size)
            outcomes = [engine.generate(PROMPT, size=size, seed=seed).outcome for seed in range(num_pictures)]
            step_s = statistics.median(
                (run.end_s - run.start_s) / run.task.num_steps
                for outcome in outcomes
                for run in outcome.runs
                if run.task.stage == DENOISE
            )
            picture_s = statistics.median(outcome.latency_s for outcome in outcomes)
            bars = f" (bars {STEP_BAR_S:g} s and {PICTURE_BAR_S:g} s)" if size == SIZES[0] else ""
            print(f"{size} on one core: a step {step_s:.3f} s, a picture {picture_s:.2f} s{bars}")


def measure_server(port: int) -> None:
    command = [sys.executable, "-c", "from tetriserve.cli import main; main()", "serve", "--ranks", "2"]
    server = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(server, port)
        for size in SIZES:
            post(port, {"prompt": PROMPT, "size": size, "n": 2})
        gigabytes = sum(map(pss_kb, family(server.pid))) * 1024 / 1e9
        print(f"a server with 2 ranks after pictures of every size: {gigabytes:.2f} GB (bar {MEMORY_BAR_GB:g} GB)")
    finally:
        server.terminate()
        server.wait()


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    give_up = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready"):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("the server did not become ready")


def post(port: int, body: dict[str, object]) -> None:
    url = f"http://127.0.0.1:{port}/v1/images/generations"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request).read()


def family(pid: int) -> Iterator[int]:
    """A process and all its descendants."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from family(int(child))


def pss_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10, help="of each size")
    parser.add_argument("--port", type=int, default=8077)
    arguments = parser.parse_args()
    time_pictures(arguments.pictures)
    measure_server(arguments.port)


if __name__ == "__main__":
    main()
