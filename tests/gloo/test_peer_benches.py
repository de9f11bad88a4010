"""What the load generators of vLLM-Omni, SGLang and GF-DiT send, to a real server of the bundled model."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import httpx
from PIL import Image

from tests.peers import asks
from tests.waiting import HANG_S


def test_every_request_of_a_peers_client_is_answered_with_images(profile_path: str) -> None:
    command = [sys.executable, "-c", "from tetriserve.cli import main; main()", "serve", "--port", "0", "--ranks", "2"]
    command += ["--profile", profile_path, "--log-format", "json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TETRISERVE_")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True) as server:
        assert server.stderr is not None
        try:
            url = next(found[0] for line in server.stderr if (found := re.search(r"http://[0-9.:]+", line)))
            with httpx.Client(base_url=url, timeout=HANG_S) as http:
                for ask in asks(256):
                    response = http.post(ask.path, json=ask.body, headers=ask.headers)
                    assert response.status_code == 200, (ask.name, response.text)
                    images = [Image.open(io.BytesIO(file)) for file in ask.images_of(response.json())]
                    sizes = {image.size for image in images}
                    assert len(images) == ask.body.get("n", 1), ask.name
                    assert sizes == {(256, 256)} or "without options" in ask.name, ask.name
        finally:
            server.terminate()
        server.communicate(timeout=HANG_S)
        assert server.returncode == 0
