"""What the processes of a real server write to stderr, under `--log-format json`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import httpx

from tests.waiting import HANG_S

SECRET = "hush"
BODY = {"prompt": f"{SECRET} " * 900, "size": "256x256", "num_inference_steps": 2, "slo_ms": 60_000}
"""The prompt is longer than either text encoder reads."""


def test_every_line_of_every_process_is_an_object_and_none_has_a_prompt(profile_path: str) -> None:
    command = [sys.executable, "-c", "from tetriserve.cli import main; main()", "serve", "--port", "0", "--ranks", "2"]
    command += ["--profile", profile_path, "--log-format", "json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TETRISERVE_")}
    lines = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True) as server:
        assert server.stderr is not None
        try:
            for line in server.stderr:
                lines.append(line)
                if '"serving ' in line:
                    break
            url = json.loads(lines[-1])["message"].split()[-1]
            answer = httpx.post(f"{url}/v1/images/generations", json=BODY, timeout=HANG_S)
        finally:
            server.terminate()
        lines += server.stderr
        assert server.wait(HANG_S) == 0
    assert answer.status_code == 200
    for line in lines:
        assert json.loads(line)["message"]
        assert SECRET not in line
