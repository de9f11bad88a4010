"""Pictures that come with a prompt, on real processes: by HTTP, through kills of workers and of the server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from tests.families.flux import FLUX_KONTEXT
from tests.gloo.test_server_kill import Server, until
from tests.waiting import HANG_S
from tests.waiting import until as until_async
from tetriserve import Engine
from tetriserve.config import EngineConfig, ModelConfig, PoolConfig
from tetriserve.core.execution import Execution
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, ENCODE_IMAGE, INPUT
from tetriserve.engine import Generation, Intake
from tetriserve.engine.picture_rules import PictureRules
from tetriserve.engine.pictures import InputPicture
from tetriserve.launch import StartProgress, launch
from tetriserve.models.adapter import Member
from tetriserve.models.card import ModelCard
from tetriserve.models.checkpoint import read_card
from tetriserve.models.diffusion import DiffusionAdapter
from tetriserve.models.registry import load_adapter
from tetriserve.profile import Profile, ProfileCost, Row, save_profile

PIXEL_TOLERANCE = 1
SEED = 5
STEPS, STRENGTH = 20, 0.6
PROMPT = "a green triangle on a white background"


def picture(height: int, width: int) -> np.ndarray:
    """A ramp of colours with a dark square."""
    rows, columns = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)[None, :]
    channels = np.broadcast_arrays(rows, columns, 255 - rows)
    pixels = np.stack(channels, axis=-1).astype(np.uint8)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = 20
    return np.ascontiguousarray(pixels)


PIXELS = picture(200, 300)
FILE = io.BytesIO()
Image.fromarray(PIXELS).save(FILE, "png")
PNG = FILE.getvalue()
URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


def painted(adapter: DiffusionAdapter, request: Request, images: Sequence[np.ndarray]) -> np.ndarray:
    """The picture that one process makes alone, a task a stage."""
    pictures = {str(number): torch.from_numpy(image) for number, image in enumerate(images)}
    member = Member(request, 0, {INPUT: pictures})
    for stage in request.stages:
        member.steps_done = 0
        [left] = adapter.run(stage.kind, [member], stage.num_steps, lambda: None)
        member.states = {**member.states, stage.kind: left.tensors}
    return left.tensors["pixels"].numpy()


def request_of(card: ModelCard, profile: Profile, **options: Any) -> Request:
    """As the engine makes it."""
    generation = Generation(
        **{
            "prompt": PROMPT, "images": (InputPicture.of(PIXELS),), "size": "256x256", "seed": SEED,
            "num_steps": STEPS, "strength": STRENGTH, **options,
        }
    )  # fmt: skip
    cost = ProfileCost(profile)
    return Intake(card=card, cost=cost).request(generation, request_id="r", seed=0, now=0.0, cost=cost)


def distance(pixels: np.ndarray, others: np.ndarray) -> int:
    return int(np.abs(pixels.astype(int) - others).max())


def decoded(b64_json: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))))


@pytest.fixture
def expected(reference: DiffusionAdapter, bundled_card: ModelCard, profile: Profile) -> np.ndarray:
    return painted(reference, request_of(bundled_card, profile), [PIXELS])


def test_every_way_to_send_a_picture_gives_the_image_of_one_process_and_a_killed_server_goes_on_with_it(
    tmp_path: Path, profile_path: str, expected: np.ndarray, reference: DiffusionAdapter, bundled_card: ModelCard,
    profile: Profile,
) -> None:  # fmt: skip
    asked: dict[str, Any] = {"num_inference_steps": STEPS, "strength": STRENGTH, "seed": SEED, "degrees": 1}
    as_json = {"prompt": PROMPT, "size": "256x256", **asked}
    server = Server(tmp_path / "journal", profile_path)
    try:
        server.start()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=HANG_S)
        form = client.images.edit(image=("in.png", PNG), prompt=PROMPT, size="256x256", extra_body=asked).data[0]
        assert np.array_equal(decoded(form.b64_json), expected)
        assert len(form.schedule["degrees"]) == 12  # 0.6 of 20
        assert [run["stage"] for run in form.schedule["runs"]][:2] == [ENCODE, ENCODE_IMAGE]
        with httpx.Client(base_url=server.url, timeout=HANG_S) as http:
            answer = http.post("/v1/images/edits", json={**as_json, "image": URL}).json()
            assert answer["data"][0]["b64_json"] == form.b64_json
            content = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": {"url": URL}}]
            chat = {"messages": [{"role": "user", "content": content}], "size": "256x256", "extra_body": asked}
            (part,) = http.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
            assert part["image_url"]["url"] == f"data:image/png;base64,{form.b64_json}"
            plain = http.post("/v1/images/generations", json={**as_json, "strength": None}).json()
            assert distance(decoded(plain["data"][0]["b64_json"]), expected) > 20, "the picture matters"
            (model,) = http.get("/v1/models").json()["data"]
            assert (model["min_images"], model["max_images"], model["default_strength"]) == (0, 1, 0.6)
        client.close()

        large: dict[str, Any] = {**as_json, "size": "512x512", "n": 2, "degrees": [1, 2]}
        body = {**large, "image": URL}
        headers = {"Idempotency-Key": "order 66"}

        def ask() -> httpx.Response:
            return httpx.post(f"{server.url}/v1/images/edits", json=body, headers=headers, timeout=HANG_S)

        def ask_and_be_cut_off() -> None:
            with contextlib.suppress(httpx.HTTPError):
                ask()

        steps_before = server.metric("tetriserve_steps_total")
        cut_off = threading.Thread(target=ask_and_be_cut_off)
        cut_off.start()
        until(lambda: server.metric("tetriserve_steps_total") > steps_before)
        server.kill()
        cut_off.join()
        server.start()
        assert server.metric("tetriserve_journal_resumed_total") >= 1
        response = ask()
        assert response.status_code == 200, response.text
        for number, item in enumerate(response.json()["data"]):
            request = request_of(bundled_card, profile, size="512x512", seed=SEED + number)
            assert distance(decoded(item["b64_json"]), painted(reference, request, [PIXELS])) <= PIXEL_TOLERANCE
            assert len(item["schedule"]["degrees"]) == 12
        other = httpx.post(
            f"{server.url}/v1/images/edits", json={**body, "strength": 0.5}, headers=headers, timeout=HANG_S
        )
        assert other.json()["error"]["code"] == "idempotency_key_reused"
        assert server.stop() == 0
    finally:
        with contextlib.suppress(ProcessLookupError, AssertionError):
            server.kill()


@pytest.mark.parametrize("stage", [ENCODE_IMAGE, DENOISE])
async def test_a_worker_that_is_killed_takes_no_picture_along(
    stage: str, bundled_dir: Path, profile_path: str, expected: np.ndarray
) -> None:
    pool = PoolConfig(num_ranks=2, heartbeat_timeout_s=HANG_S)
    config = EngineConfig(models=(ModelConfig(path=str(bundled_dir), profile=profile_path),), pool=pool)
    jobs = await launch(config, StartProgress())
    engine = jobs.engine
    pids = engine._executor.pids  # type: ignore[attr-defined]
    generation = Generation(
        prompt=PROMPT, images=(InputPicture.of(PIXELS),), size="256x256", seed=SEED, num_steps=STEPS,
        strength=STRENGTH, slo_s=600.0,
    )  # fmt: skip
    killed: list[int] = []

    def observe(observation: object) -> None:
        for flight in engine.state.in_flight:
            if flight.task.stage == stage and not killed:
                killed.append(flight.task.ranks[0])
                os.kill(pids[killed[0]], signal.SIGKILL)

    engine.subscribe(observe)
    asking = asyncio.create_task(engine.generate(generation))
    await until_async(lambda: observe(None) or killed or asking.done())
    image = await asyncio.wait_for(asking, HANG_S)
    assert len(killed) == 1
    assert distance(image.pixels, expected) <= PIXEL_TOLERANCE
    await until_async(lambda: len(engine.state.ranks) == 2)
    left = [path.name for path in engine._executor._directory.path.iterdir()]  # type: ignore[attr-defined]
    assert [name for name in left if f".{INPUT}." in name] == []
    await jobs.stop()


def kontext_profile(card: ModelCard) -> Profile:
    """Up to what its steps take: a picture of a million pixels beside the image."""
    shapes = (Shape(64, 64), Shape(1024, 1280))
    return Profile(
        model=card.name, fingerprint=card.fingerprint, hardware="written by hand", execution=Execution("float32"),
        source="tests", created="2026-01-01", switch_s=0.002,
        rows=(
            Row(stage=ENCODE, seconds=0.01),
            *(
                Row(
                    stage=DENOISE, height=shape.height, width=shape.width, tokens=shape.num_pixels // 256,
                    degree=degree, seconds=shape.num_pixels / 1e6 / degree,
                )
                for shape in shapes
                for degree in (1, 2)
            ),
            *(
                Row(stage=stage, height=shape.height, width=shape.width, seconds=shape.num_pixels / 1e6)
                for stage in (ENCODE_IMAGE, DECODE)
                for shape in shapes
            ),
        ),
    )  # fmt: skip


def test_kontext_draws_beside_a_picture_at_any_degree(tmp_path: Path) -> None:
    path = tmp_path / "kontext"
    FLUX_KONTEXT.build(path)
    options = {"dtype": "float32", "max_sequence_length": FLUX_KONTEXT.num_text_tokens}
    (path / "tetriserve.json").write_text(json.dumps(options))
    card = read_card(path)
    profile = kontext_profile(card)
    save_profile(profile, tmp_path / "profile.json")
    adapter = load_adapter(card, "cpu")
    assert isinstance(adapter, DiffusionAdapter)
    with Engine(str(path), ranks=2, profile=str(tmp_path / "profile.json")) as engine:
        for image, size, degrees, tolerance in (
            (Image.fromarray(PIXELS), "128x96", (1,), 0),
            (PIXELS, None, (2,), PIXEL_TOLERANCE),
        ):
            drawn = engine.generate(PROMPT, images=[image], size=size, seed=SEED, num_steps=2, degrees=degrees)
            request = request_of(card, profile, size=size, num_steps=2, strength=None)
            assert drawn.outcome.request.shape == request.shape == Shape.parse(size or "304x208")
            assert distance(np.asarray(drawn.image), painted(adapter, request, [PIXELS])) <= tolerance
        alone = engine.generate(PROMPT, size="128x96", seed=SEED, num_steps=2)
        assert [run.task.stage for run in alone.outcome.runs] == [ENCODE, DENOISE, DECODE]


@pytest.mark.parametrize("pipeline_class", ["FluxImg2ImgPipeline", "StableDiffusion3Img2ImgPipeline"])
def test_a_strength_skips_as_many_steps_as_in_diffusers(
    pipeline_class: str, bundled_card: ModelCard, profile: Profile
) -> None:
    import diffusers

    rules = PictureRules(bundled_card, ProfileCost(profile))
    scheduler = SimpleNamespace(order=1, timesteps=torch.arange(200), set_begin_index=lambda index: None)
    pipeline = SimpleNamespace(scheduler=scheduler)
    get_timesteps = getattr(diffusers, pipeline_class).get_timesteps
    for num_steps in (1, 2, 3, 7, 20, 28, 50, 199):
        for strength in (
            0.001,
            0.01,
            0.05,
            0.1,
            0.25,
            0.3,
            1 / 3,
            0.5,
            0.55,
            0.6,
            0.7,
            0.75,
            0.8,
            0.9,
            0.95,
            0.999,
            1.0,
        ):
            _, num_made = get_timesteps(pipeline, num_steps, strength, "cpu")
            assert num_steps - rules.skipped_steps(strength, num_steps, 1) == num_made, (num_steps, strength)
