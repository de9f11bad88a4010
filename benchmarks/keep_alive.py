"""What a kept connection costs: latency of /health and images per second of 8 clients, with and without two settings.

The server is real; its ranks are timers that end at once. One run compares it with itself: without TCP_NODELAY, and
without a frozen heap. Ratios are of medians over alternating rounds, so that what else the machine does falls on all.
Pauses are of the garbage collector's oldest generation, after `--tasks` tasks have been kept for /debug/trace.
"""

from __future__ import annotations

import argparse
import gc
import http.client
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/server"))

VARIANTS = {"as served": [], "no TCP_NODELAY": ["--delay"], "heap not frozen": ["--thaw"]}
NUM_CLIENTS = 8
NUM_PROBES = 50
IMAGE = json.dumps({"prompt": "a lighthouse", "size": "64x64", "num_inference_steps": 1})


def serve(*, is_delayed: bool, is_thawed: bool) -> int:
    """In this process, until a signal comes; prints the URL, and at the end the collector's pauses in milliseconds."""
    from fake_engine import FakeExecutor, make_engine

    import tetriserve.launch  # noqa: F401  what `tetriserve serve` has loaded
    from tetriserve.config import ServerConfig
    from tetriserve.engine import Jobs, LiveEngine, Stopped
    from tetriserve.server import run

    listen, pauses_ms, num_walked, begun_s = run.listen, [0.0], 0, 0.0

    def listen_delayed(host: str, port: int) -> socket.socket:
        listener = listen(host, port)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
        return listener

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal begun_s, num_walked
        if info["generation"] == 2 and phase == "start":
            begun_s = time.perf_counter()
        elif info["generation"] == 2:
            pauses_ms.append((time.perf_counter() - begun_s) * 1000)
            num_walked = len(gc.get_objects())

    async def launch() -> Jobs:
        executor = FakeExecutor(takes_time=False)
        executor.started = deque(maxlen=0)  # a list for tests, which grows
        return Jobs(make_engine(executor))

    def on_ready(url: str, engine: LiveEngine) -> None:
        engine.subscribe(lambda observation: gc.callbacks.remove(note) if isinstance(observation, Stopped) else None)
        gc.callbacks.append(note)
        print(url, flush=True)

    if is_delayed:
        run.listen = listen_delayed
    if is_thawed:
        gc.freeze = lambda: None
    exit_code = run.run_server(ServerConfig(port=0), launch, on_ready=on_ready)
    print(json.dumps({"pauses_ms": pauses_ms, "num_walked": num_walked}), flush=True)
    return exit_code


class Client:
    """One kept connection."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)

    def probe(self) -> float:
        """Milliseconds of one answer of /health."""
        start_s = time.perf_counter()
        self._ask("GET", "/health")
        return (time.perf_counter() - start_s) * 1000

    def draw(self) -> None:
        self._ask("POST", "/v1/images/generations", IMAGE)

    def _ask(self, method: str, path: str, body: str | None = None) -> None:
        self._connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        answer.read()
        assert answer.status == 200, answer.status


def draw_for(url: str, seconds: float) -> float:
    """Images per second of `NUM_CLIENTS` clients, each of which asks again as soon as it has its image."""
    until_s = time.perf_counter() + seconds
    counts = [0] * NUM_CLIENTS

    def draw(number: int) -> None:
        client = Client(url)
        while time.perf_counter() < until_s:
            client.draw()
            counts[number] += 1

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def line_of(server: subprocess.Popen[str]) -> str:
    """The next that it prints."""
    assert server.stdout is not None
    return server.stdout.readline().strip()


def compare(rounds: int, seconds: float, num_tasks: int) -> None:
    probes: dict[str, list[float]] = {name: [] for name in VARIANTS}
    rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
    pauses: dict[str, str] = {}
    with ExitStack() as running:
        servers = {}
        for name, options in VARIANTS.items():
            command = [sys.executable, __file__, "--serve", *options]
            servers[name] = running.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            running.callback(servers[name].terminate)
        urls = {name: line_of(server) for name, server in servers.items()}
        for _ in range(rounds):
            for name, url in urls.items():
                client = Client(url)
                probes[name] += [client.probe() for _ in range(NUM_PROBES)]
                rates[name].append(draw_for(url, seconds))
        for name, url in urls.items():
            drawn = sum(rates[name]) * seconds
            while drawn * 3 < num_tasks:  # an image of one step is three tasks
                drawn += draw_for(url, seconds) * seconds
        for name, server in servers.items():
            server.terminate()
            pauses[name] = line_of(server)
    first = next(iter(VARIANTS))
    for name in VARIANTS:
        p50, rate = statistics.median(probes[name]), statistics.median(rates[name])
        p50_ratio, rate_ratio = p50 / statistics.median(probes[first]), rate / statistics.median(rates[first])
        collected = json.loads(pauses[name])
        pauses_ms = collected["pauses_ms"]
        print(
            f"{name:16} /health p50 {p50:6.2f} ms (x{p50_ratio:.2f}), {rate:6.1f} images/s (x{rate_ratio:.2f}), "
            f"{len(pauses_ms) - 1} collections of the oldest generation, longest {max(pauses_ms):.1f} ms, "
            f"the last over {collected['num_walked']} objects"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of 8 clients, per round and variant")
    parser.add_argument("--tasks", type=int, default=0, help="go on until so many tasks have run, before the end")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--delay", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--thaw", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(is_delayed=options.delay, is_thawed=options.thaw)
    compare(options.rounds, options.seconds, options.tasks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
