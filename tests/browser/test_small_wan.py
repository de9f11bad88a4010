"""The board of a real server: a tiny Wan pipeline makes a video beside pictures of the bundled model, and it plays."""

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
from tetriserve.profiles import BUNDLED_PROFILES

PROFILE = BUNDLED_PROFILES / "tetriserve-tiny.2-epyc-cores.2-ranks.json"
MEASURED = (Shape(128, 128, 5), Shape(128, 128, 33))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("small-wan")
    build(folder / "model")
    save_profile(_profile(folder / "model"), folder / "profile.json")
    command = [sys.executable, "-c", "from tetriserve.cli import main; main()", "serve", "--port", "0", "--ranks", "2"]
    command += ["--model", "images=bundled", "--model", f"videos={folder / 'model'}", "--log-format", "json"]
    command += ["--model-option", f"images=profile={PROFILE}"]
    command += ["--model-option", f"videos=profile={folder / 'profile.json'}"]
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
        rows += [Row(stage=DENOISE, tokens=tokens, degree=degree, seconds=0.1, **size) for degree in (1, 2)]
        rows.append(Row(stage=DECODE, seconds=1.0, **size))
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
    page.get_by_label("Deadline").fill("600")
    page.get_by_label("Model").select_option("videos")
    page.get_by_label("Size", exact=True).select_option("128x128")
    page.get_by_label("or frames").fill("17")
    page.locator(".more").evaluate("details => details.open = true")
    page.get_by_label("Steps", exact=True).fill("20")
    page.get_by_role("button", name="Make it").click()
    page.get_by_label("Model").select_option("images")
    page.get_by_label("Size", exact=True).select_option("256x256")
    page.get_by_label("Steps", exact=True).fill("4")
    page.get_by_role("button", name="Draw it").click()
    picture, video = page.locator(".picture").all()
    expect(picture.locator(".verdict")).to_contain_text("In time by")
    assert picture.locator("img").evaluate("image => image.naturalWidth") == 256
    expect(video.locator(".verdict")).to_contain_text("In time by")
    player = video.locator("video")
    player.evaluate("v => v.readyState || new Promise((resolve) => (v.onloadedmetadata = resolve))")
    assert player.evaluate("v => [v.videoWidth, v.videoHeight]") == [128, 128]
    assert player.evaluate("v => v.duration") == pytest.approx(17 / 16, abs=0.01)
    keep(page, "small-wan-light")
