"""Pictures under an idempotency key: kept from the acceptance on, and there again in the next life of the server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from fake_engine import FakeExecutor, make_journalled_jobs
from pictures_sent import PIXELS, PNG
from safetensors.numpy import load

from tests.waiting import until
from tetriserve.core.stages import DENOISE, ENCODE, ENCODE_IMAGE, INPUT
from tetriserve.server import EngineSlot

URL = "/v1/images/edits"
FIELDS = {"prompt": "a lighthouse", "size": "64x64", "n": "2", "num_inference_steps": "8", "strength": "0.5"}
LOST = "the pictures that came with this request cannot be read any more; send it with a new key"


async def ask(jobs, connect, key="k"):
    async with connect(EngineSlot(jobs.engine, jobs)) as client:
        return await client.post(URL, data=FIELDS, files={"image": PNG}, headers={"Idempotency-Key": key})


async def crash_at(stage, connect, path: Path) -> list[int]:
    """A server that goes down when the first task of `stage` has begun, as kill -9 leaves things; the images' seeds."""
    executor = FakeExecutor()
    executor.gate.clear()
    jobs = await make_journalled_jobs(executor, path, policy="fixed:1")
    asking = asyncio.create_task(ask(jobs, connect))
    await until(lambda: executor.started)
    if stage != ENCODE:
        executor.gate.set()
        await until(lambda: any(command.task.stage == stage for command in executor.started))
        executor.gate.clear()
    seeds = [trajectory.request.seed for trajectory in jobs.engine.state.trajectories]
    await until(lambda: not jobs.journal.num_waiting)
    jobs.journal.close()
    await executor.stop()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    return sorted(seeds)


def kept_files(path: Path, stage: str) -> list[Path]:
    return [file for file in (path / "tensors").iterdir() if f".{stage}." in file.name]


def spoil(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("stage", [ENCODE, ENCODE_IMAGE, DENOISE])
async def test_the_next_life_goes_on_with_the_same_pictures(connect, tmp_path, stage):
    seeds = await crash_at(stage, connect, tmp_path / "j")
    executor = FakeExecutor()
    jobs = await make_journalled_jobs(executor, tmp_path / "j", policy="fixed:1")
    response = await ask(jobs, connect)
    assert response.status_code == 200, response.text
    assert sorted(item["seed"] for item in response.json()["data"]) == seeds
    assert all(len(item["schedule"]["degrees"]) == 4 for item in response.json()["data"])
    for command in executor.started:
        (work,) = command.work
        np.testing.assert_array_equal(load(executor.states.get(work.states[INPUT]))["0"], PIXELS)
    assert jobs.num_resumed == 2
    again = await ask(jobs, connect)
    assert again.json()["data"] == response.json()["data"]
    assert kept_files(tmp_path / "j", INPUT) == [], "pictures go with their request"
    await jobs.stop()


async def test_pictures_that_are_damaged_fail_their_request_once_and_for_all(connect, tmp_path, caplog):
    await crash_at(ENCODE, connect, tmp_path / "j")
    files = kept_files(tmp_path / "j", INPUT)
    assert len(files) == 2
    spoil(files[1])
    for _ in range(2):
        executor = FakeExecutor()
        jobs = await make_journalled_jobs(executor, tmp_path / "j")
        for _ in range(2):
            response = await ask(jobs, connect)
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["message"]) == (500, "generation_failed", LOST)
        assert executor.started == []
        restored = {key.partition(".")[0] for key in executor.states.bundles if INPUT in key}
        assert restored <= set(executor.forgotten), "what was sound of it goes again"
        assert (await ask(jobs, connect, "another")).status_code == 200
        await jobs.stop()
    assert sum(f"was not taken up: {LOST}" in record.getMessage() for record in caplog.records) == 1
    assert kept_files(tmp_path / "j", INPUT) == []


async def test_other_state_that_is_damaged_is_made_again_from_the_same_pictures(connect, tmp_path):
    seeds = await crash_at(DENOISE, connect, tmp_path / "j")
    encoded = kept_files(tmp_path / "j", ENCODE_IMAGE)
    assert encoded
    for file in encoded:
        spoil(file)
    executor = FakeExecutor()
    jobs = await make_journalled_jobs(executor, tmp_path / "j")
    response = await ask(jobs, connect)
    assert response.status_code == 200, response.text
    assert sorted(item["seed"] for item in response.json()["data"]) == seeds
    assert sum(command.task.stage == ENCODE_IMAGE for command in executor.started) == 2
    await jobs.stop()
