"""A real server that is killed in the middle of its work: after a restart everyone gets what was accepted, once."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.faults.processes import find_workers
from tests.waiting import HANG_S
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.server.run import listen

PIXEL_TOLERANCE = 1
SEED = 20
NUM_STEPS = 40
BODY = {"prompt": "a green triangle", "size": "512x512", "num_inference_steps": NUM_STEPS, "n": 2, "slo_ms": 5000}
HEADERS = {"Idempotency-Key": "order 66"}


class Server:
    """One port and one journal, any number of lives. `options`: of the command, beside those."""

    def __init__(self, journal: Path, profile: str, *options: str) -> None:
        with listen("127.0.0.1", 0) as listener:
            self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._options = ["--port", str(self.port), "--journal", str(journal), "--profile", profile, *options]
        self._process: subprocess.Popen[str] | None = None

    def start(self, *options: str) -> None:
        command = [sys.executable, "-c", "from tetriserve.cli import main; main()", "serve", *self._options, *options]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        threading.Thread(target=self._process.stderr.read, daemon=True).start()  # type: ignore[union-attr]
        until(lambda: self._is_ready())

    def _is_ready(self) -> bool:
        assert self._process is not None and self._process.poll() is None, "the server ended while it started"
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/ready", timeout=HANG_S).status_code == 200
        return False

    def kill(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def workers(self) -> Collection[int]:
        """Process ids."""
        assert self._process is not None
        return find_workers(self._process.pid).values()

    def stop(self) -> int:
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(HANG_S)

    def metric(self, name: str, *labels: str) -> float:
        """The sum over its labels, of those lines that have `labels` among theirs."""
        lines = httpx.get(f"{self.url}/metrics", timeout=HANG_S).text.splitlines()
        named = [line for line in lines if line.startswith(name) and all(label in line for label in labels)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in named)

    def ask(self, **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/images/generations", json=BODY | fields, headers=HEADERS, timeout=HANG_S)

    def ask_and_be_cut_off(self) -> threading.Thread:
        def ask() -> None:
            with contextlib.suppress(httpx.HTTPError):
                self.ask()

        thread = threading.Thread(target=ask)
        thread.start()
        return thread


def until(is_so: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + HANG_S
    while not is_so():
        assert time.monotonic() < ends_at
        time.sleep(0.02)


@pytest.fixture
def server(tmp_path: Path, profile_path: str) -> Iterator[Server]:
    server = Server(tmp_path / "journal", profile_path)
    yield server
    with contextlib.suppress(ProcessLookupError, AssertionError):
        server.kill()


def distance(item: dict[str, Any], paint: Callable[[Request], np.ndarray]) -> int:
    """From the image that one process computes alone."""
    request = Request(
        request_id="alone",
        prompt=str(BODY["prompt"]),
        shape=Shape(512, 512),
        stages=image_stages(NUM_STEPS),
        seed=item["seed"],
        arrival_s=0.0,
        deadline_s=5.0,
    )
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))))
    return int(np.abs(pixels.astype(int) - paint(request)).max())


def test_a_server_killed_again_and_again_gives_the_undisturbed_images_once(
    server: Server, paint: Callable[[Request], np.ndarray]
) -> None:
    dice = random.Random(SEED)
    resumed = saved = 0.0
    for _ in range(2):
        server.start()
        resumed += server.metric("tetriserve_journal_resumed_total")
        saved += server.metric("tetriserve_journal_steps_saved_total")
        client = server.ask_and_be_cut_off()
        until(lambda: server.metric("tetriserve_steps_total") > 0)
        time.sleep(dice.uniform(0, 0.3))
        server.kill()
        client.join()
    server.start()
    resumed += server.metric("tetriserve_journal_resumed_total")
    saved += server.metric("tetriserve_journal_steps_saved_total")
    answers = [server.ask().json()["data"] for _ in range(2)]

    assert answers[0] == answers[1]
    assert resumed >= 2, "two images were under way, and at most one of them was finished before the last kill"
    assert saved > 0
    assert len({item["seed"] for item in answers[0]}) == 2, "chosen by the server, and fixed when it accepted"
    for item in answers[0]:
        assert distance(item, paint) <= PIXEL_TOLERANCE
        schedule = item["schedule"]
        assert len(schedule["degrees"]) == NUM_STEPS
        assert [run["stage"] for run in schedule["runs"]].count("encode") == 1
        assert (schedule["attained"], schedule["slo_ms"]) == (False, 5000)
    assert server.ask(prompt="another").json()["error"]["code"] == "idempotency_key_reused"
    assert server.stop() == 0


def test_what_a_stop_leaves_unfinished_is_finished_by_the_next_life(
    server: Server, paint: Callable[[Request], np.ndarray]
) -> None:
    server.start("--shutdown-timeout", "0")
    refused: list[int] = []
    client = threading.Thread(target=lambda: refused.append(server.ask().status_code))
    client.start()
    until(lambda: server.metric("tetriserve_steps_total") > 0)
    assert server.stop() == 0
    client.join()
    assert refused == [503]

    server.start()
    assert server.metric("tetriserve_journal_resumed_total") == 2
    assert server.metric("tetriserve_journal_steps_saved_total") > 0
    for item in server.ask().json()["data"]:
        assert distance(item, paint) <= PIXEL_TOLERANCE
    assert server.stop() == 0
