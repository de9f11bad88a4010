"""Does the server's memory grow with the videos that it has made? A tiny Wan on CPU ranks makes one after the other.

The server measures its model first, of one size, in a cache of its own. Memory is the resident set of the server's own
process, where neither frames nor files may stay, after each video that was polled and downloaded. Bar: at the end it is
no more than `--bar` MiB above what it was after the first tenth of the videos. Exit code 1: the bar is missed. Run with

    python benchmarks/video_memory.py [--videos 50] [--size 128x128] [--frames 33] [--bar 8] [--journal]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from tetriserve.examples import small_wan
from tetriserve.server.run import listen

READY_S = 600.0
POLL_S = 0.1
MEBI = 2**20


def start(folder: Path, size: str, num_frames: int, has_journal: bool) -> tuple[subprocess.Popen[bytes], str]:
    """The process and the URL of a server that is ready."""
    model = folder / "model"
    small_wan.build(model)
    facts = json.loads((model / "tetriserve.json").read_text())
    (model / "tetriserve.json").write_text(json.dumps(facts | {"sizes": [f"{size}x{num_frames}"]}))
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    options = ["--port", str(port), "--journal", str(folder / "journal")] if has_journal else ["--port", str(port)]
    command = [sys.executable, "-c", "from tetriserve.cli import main; main()", "serve", str(model), *options]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    give_up_at = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < give_up_at:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready").status_code == 200:
                return process, url
        time.sleep(POLL_S)
    raise SystemExit("the server did not start")


def make(client: httpx.Client, body: dict[str, Any]) -> int:
    """The bytes of one video's file."""
    video = client.post("/v1/videos", json=body).raise_for_status().json()
    while video["status"] not in ("completed", "failed"):
        time.sleep(POLL_S)
        video = client.get(f"/v1/videos/{video['id']}").raise_for_status().json()
    if video["error"] is not None:
        raise SystemExit(f"a video failed: {video['error']['message']}")
    return len(client.get(f"/v1/videos/{video['id']}/content").raise_for_status().content)


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MEBI


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=50)
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--bar", type=float, default=8.0, help="MiB that the server may grow by")
    parser.add_argument("--journal", action="store_true")
    arguments = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    width, height = map(int, arguments.size.split("x"))
    raw_mib = 3 * width * height * arguments.frames / MEBI
    with tempfile.TemporaryDirectory(prefix="tetriserve-benchmark-") as folder:
        process, url = start(Path(folder), arguments.size, arguments.frames, arguments.journal)
        try:
            with httpx.Client(base_url=url, timeout=READY_S) as client:
                idle_mib = resident_mib(process.pid)
                after_mib, num_bytes = [], 0
                for number in range(arguments.videos):
                    body = {"prompt": "a fox", "num_inference_steps": arguments.steps, "seed": number}
                    num_bytes += make(client, body)
                    after_mib.append(resident_mib(process.pid))
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    warm = max(0, arguments.videos // 10 - 1)
    grown_mib = after_mib[-1] - after_mib[warm]
    console.print(
        f"{arguments.videos} videos of {arguments.size} with {arguments.frames} frames, "
        f"{'with' if arguments.journal else 'without'} a journal: {num_bytes / MEBI:.1f} MiB of files, "
        f"{arguments.videos * raw_mib:.0f} MiB of frames"
    )
    console.print(
        f"the server's process in MiB: idle {idle_mib:.1f}, after the first video {after_mib[0]:.1f}, after "
        f"{warm + 1} {after_mib[warm]:.1f}, at most {max(after_mib):.1f}, after the last {after_mib[-1]:.1f}"
    )
    console.print(f"grown by {grown_mib:.1f} MiB after the first {warm + 1}; the bar is {arguments.bar:g}")
    return int(grown_mib > arguments.bar)


if __name__ == "__main__":
    sys.exit(main())
