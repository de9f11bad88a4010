"""A tiny Wan on two ranks behind the HTTP server: made, deleted, and right though workers or server were killed."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from tests.gloo.test_server_kill import Server, until
from tests.waiting import HANG_S
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.examples import small_wan
from tetriserve.models.checkpoint import read_card
from tetriserve.models.registry import family_of
from tetriserve.profile import Profile, Row, save_profile

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")

av = pytest.importorskip("av")

SHAPES = (Shape(64, 64, 5), Shape(96, 96, 17))
BODY: dict[str, Any] = {"prompt": "a fox", "size": "64x64"}
EXACT = {"num_frames": 10, "num_inference_steps": 30, "seed": 5, "degrees": 1, "slo_ms": 120_000}
"""At degree 1 alone, so that its bits do not depend on the schedule."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small-wan")
    small_wan.build(folder)
    return folder


@pytest.fixture(scope="module")
def profile(model: Path) -> str:
    card = read_card(model)
    rows = [
        Row(
            stage=stage, height=shape.height, width=shape.width, frames=shape.frames, degree=degree,
            tokens=(num_tokens := family_of(card).num_tokens(card, shape)) if stage == DENOISE else None,
            seconds=0.001 * num_tokens / degree,
        )
        for shape in SHAPES
        for stage, degrees in ((DENOISE, (1, 2)), (DECODE, (1,)))
        for degree in degrees
    ]  # fmt: skip
    path = model / "profile.json"
    save_profile(
        Profile(
            model=card.name, fingerprint=card.fingerprint, hardware="written by hand", execution=card.execution,
            source="tests", created="2026-01-01", switch_s=0.002, frame_step=card.frame_step,
            rows=(Row(stage=ENCODE, seconds=0.02), *rows),
        ),
        path,
    )  # fmt: skip
    return str(path)


@pytest.fixture
def server(tmp_path: Path, model: Path, profile: str) -> Iterator[Server]:
    server = Server(tmp_path / "journal", profile, str(model), "--ranks", "2")
    yield server
    with contextlib.suppress(ProcessLookupError, AssertionError):
        server.kill()


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=HANG_S)


def test_videos_are_made_and_deleted_and_go_on_after_workers_and_the_server_were_killed(server: Server) -> None:
    server.start()
    with client_of(server) as client:
        video = client.videos.create_and_poll(**BODY, extra_body=EXACT)
        assert (video.status, video.progress, video.error) == ("completed", 100, None)
        facts = video.model_extra
        assert facts is not None
        assert (facts["num_frames"], facts["fps"], video.seconds) == (9, 16.0, "0.5625")
        assert facts["warnings"] == ["num_frames: 10 was rounded to 9: small-wan-t2v makes 1 + a multiple of 4"]
        assert facts["schedule"]["degrees"] == [1] * 30
        undisturbed = client.videos.download_content(video.id).content
        with av.open(io.BytesIO(undisturbed)) as container:
            assert [frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)] == [(64, 64, 3)] * 9
        thumbnail = client.videos.download_content(video.id, variant="thumbnail").content
        assert Image.open(io.BytesIO(thumbnail)).size == (64, 64)

        sync = httpx.post(f"{server.url}/v1/videos/sync", json=BODY | EXACT, timeout=HANG_S)
        assert sync.content == undisturbed

        long = client.videos.create(**BODY, extra_body=EXACT | {"num_frames": 17, "num_inference_steps": 200})
        until(lambda: client.videos.retrieve(long.id).progress > 0)
        assert client.videos.delete(long.id).deleted
        until(lambda: server.metric("tetriserve_ranks_busy") == 0)
        assert server.metric("tetriserve_requests_total", 'status="cancelled"') == 1
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(long.id)

        steps_before = server.metric("tetriserve_steps_total")
        struck = client.videos.create(**BODY, extra_body=EXACT)
        until(lambda: server.metric("tetriserve_steps_total") > steps_before)
        for pid in server.workers():
            os.kill(pid, signal.SIGKILL)
        assert client.videos.poll(struck.id).status == "completed"
        assert server.metric("tetriserve_workers_restarted_total") == 2
        assert client.videos.download_content(struck.id).content == undisturbed

        steps_before = server.metric("tetriserve_steps_total")
        running = client.videos.create(**BODY, extra_body=EXACT)
        waiting = client.videos.create(**BODY, extra_body=EXACT | {"seed": 6, "num_inference_steps": 4})
        until(lambda: server.metric("tetriserve_steps_total") > steps_before)
        before = [each.id for each in client.videos.list()]
    server.kill()

    server.start()
    with client_of(server) as client:
        assert [each.id for each in client.videos.list()] == before == [waiting.id, running.id, struck.id, video.id]
        assert client.videos.retrieve(video.id) == video
        assert client.videos.download_content(video.id).content == undisturbed
        resumed = client.videos.poll(running.id)
        assert (resumed.status, resumed.created_at) == ("completed", running.created_at)
        assert client.videos.download_content(running.id).content == undisturbed
        assert client.videos.poll(waiting.id).status == "completed"
        assert server.metric("tetriserve_journal_resumed_total") >= 1
    assert server.stop() == 0
