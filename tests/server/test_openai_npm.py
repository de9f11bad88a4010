"""OpenAI's npm package: skipped without Node and without the package.

To run it: `npm install openai` in some directory, and name its `node_modules` in TETRISERVE_NODE_MODULES.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_engine import CARD
from test_openai_client import ALLOWED, BASE, REFUSED

NODE = shutil.which("node")
MODULES = Path(os.environ.get("TETRISERVE_NODE_MODULES", "node_modules")).resolve()

pytestmark = pytest.mark.skipif(
    NODE is None or not (MODULES / "openai").is_dir(), reason="needs node and the npm package openai"
)


async def told_by_node(url: str, calls: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    assert NODE is not None
    script = str(Path(__file__).parent / "openai_npm.mjs")
    program = await asyncio.create_subprocess_exec(
        NODE, script, f"{url}/v1", str(MODULES), json.dumps(calls), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await program.communicate()
    assert program.returncode == 0
    return [json.loads(line) for line in output.splitlines()]


async def test_every_documented_parameter_is_an_image_or_a_refusal(start_live):
    url = await start_live().url
    allowed = [BASE | fields for several in ALLOWED.values() for fields in several]
    refused = [BASE | fields for several in REFUSED.values() for fields in several]
    told = await told_by_node(url, [("images", fields) for fields in (*allowed, *refused)])
    for fields, answer in zip(allowed, told, strict=False):
        assert len(answer["heads"]) == fields.get("n", 1), (fields, answer)
        assert set(answer["heads"]) <= {"\x89PNG", "\xff\xd8\xff\xe0", "RIFF"}
        assert answer["usage"]["total_tokens"] > 0
    for fields, answer in zip(refused, told[len(allowed) :], strict=True):
        assert (answer["error"], answer["status"]) == ("BadRequestError", 400), (fields, answer)
        assert answer["param"] in fields


async def test_streams_chats_and_other_models(start_live):
    message = {"role": "user", "content": "a lighthouse"}
    stream, chat, other = await told_by_node(
        await start_live().url,
        [
            ("images", {**BASE, "stream": True, "partial_images": 1}),
            ("chat", {"model": CARD.name, "messages": [message], "size": "64x64"}),
            ("images", {**BASE, "model": "gpt-image-2"}),
        ],
    )
    assert stream["types"][-1] == "image_generation.completed"
    assert stream["usage"]["total_tokens"] == chat["usage"]["total_tokens"] == 80
    assert chat["url"] == "data:image/png;base64,"
    assert (other["error"], other["status"]) == ("NotFoundError", 404)
