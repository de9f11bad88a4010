"""The board of a real server: a tiny Wan pipeline makes a video, which plays."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.waiting import HANG_S
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.examples.small_wan import build
from tetriserve.models.checkpoint import read_card
from tetriserve.models.registry import family_of
from tetriserve.profile import Profile, Row, save_profile

MEASURED = (Shape(128, 128, 5), Shape(128, 128, 33))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("small-wan")
    build(folder / "model")
    save_profile(_profile(folder / "model"), folder / "profile.json")
    command = [sys.executable, "-c", "from tetriserve.cli import main; main()", "serve", str(folder / "model")]
    command += ["--port", "0", "--ranks", "1", "--profile", str(folder / "profile.json")]
    command += ["--log-format", "json"]
    log = folder / "server.log"
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            yield _url(process, log)
        finally:
            process.terminate()
        assert process.wait(HANG_S) == 0, log.read_text()


def _profile(model: Path) -> Profile:
    """Made up: measuring takes minutes."""
    card = read_card(model)
    rows = [Row(stage=ENCODE, seconds=0.05)]
    for shape in MEASURED:
        size = {"height": shape.height, "width": shape.width, "frames": shape.frames}
        tokens = family_of(card).num_tokens(card, shape)
        rows += [Row(stage=DENOISE, tokens=tokens, seconds=0.1, **size), Row(stage=DECODE, seconds=1.0, **size)]
    return Profile(
        model=card.name,
        hardware="none",
        execution=card.execution,
        source="made up",
        created="2026-01-01",
        switch_s=0.002,
        frame_step=card.frame_step,
        rows=tuple(rows),
    )


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    until = time.monotonic() + HANG_S
    while time.monotonic() < until and process.poll() is None:
        for line in log.read_text().splitlines():
            if '"serving ' in line:
                return str(json.loads(line)["message"].split()[-1])
        time.sleep(0.1)
    raise RuntimeError(f"the server does not serve: {log.read_text()[-500:]}")


def test_a_real_pipelines_video_plays(open_page, url, keep):
    page = open_page(url)
    expect(page.locator("#connection")).to_have_text("live")
    expect(page.get_by_role("heading", name="Ask for a video")).to_be_visible()
    expect(page.get_by_label("Model")).to_be_hidden()
    page.get_by_label("Size", exact=True).select_option("128x128")
    page.get_by_label("or frames").fill("17")
    page.get_by_label("Deadline").fill("600")
    page.locator(".more").evaluate("details => details.open = true")
    page.get_by_label("Steps", exact=True).fill("6")
    page.get_by_role("button", name="Make it").click()
    card = page.locator(".picture").first
    expect(card.locator(".verdict")).to_contain_text("In time by")
    player = card.locator("video")
    metadata = "async (v) => { if (!v.readyState) await new Promise((resolve) => (v.onloadedmetadata = resolve)); }"
    player.evaluate(metadata)
    assert player.evaluate("v => [v.videoWidth, v.videoHeight]") == [128, 128]
    assert player.evaluate("v => v.duration") == pytest.approx(17 / 16, abs=0.01)
    keep(page, "small-wan-light")
