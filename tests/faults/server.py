"""A real server in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.waiting import HANG_S
from tetriserve.profiles import BUNDLED_PROFILES

HEARTBEAT_TIMEOUT_S = 2.0
MAX_QUEUE = 12
_PROFILE = BUNDLED_PROFILES / "tetriserve-tiny.2-epyc-cores.4-ranks.json"


@dataclass(frozen=True, kw_only=True)
class Server:
    """pid: also the id of the session of all its processes. log: JSON, one object per line."""

    pid: int
    url: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def log_lines(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """Lines of the log so far, each with its time in seconds since the epoch."""
        for text in self.log.read_text(errors="replace").splitlines():
            if text.startswith("{"):
                line = json.loads(text)
                yield datetime.fromisoformat(line["time"]).timestamp(), line


@asynccontextmanager
async def serving(folder: Path, num_ranks: int, policy: str, *options: str) -> AsyncIterator[Server]:
    """A server of the bundled model on a free port, ready. It ends by SIGTERM, and has to end well."""
    log = folder / "server.log"
    command = [sys.executable, "-c", "from tetriserve.cli import main; main()", "serve", "--port", "0"]
    command += ["--ranks", str(num_ranks), "--policy", policy, "--profile", str(_PROFILE)]
    command += ["--heartbeat-timeout", str(HEARTBEAT_TIMEOUT_S), "--max-queue", str(MAX_QUEUE)]
    command += ["--log-format", "json", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TETRISERVE_")}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        yield Server(pid=process.pid, url=await _url(process, log), log=log)
        process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(process.wait, HANG_S)
        assert code == 0, f"the server ended with {code}: {log.read_text()[-500:]}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    async with asyncio.timeout(HANG_S):
        while process.poll() is None:
            for line in log.read_text().splitlines():
                if '"serving ' in line:
                    return str(json.loads(line)["message"].split()[-1])
            await asyncio.sleep(0.1)
    raise RuntimeError(f"the server ended: {log.read_text()[-500:]}")
