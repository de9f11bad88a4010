"""Many times more than can be served: the queue stays bounded, and every answer is an image or a 429 that says when."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import pytest
from fake_engine import FakeExecutor, make_engine

from tetriserve.engine import outlook
from tetriserve.server import EngineSlot

URL = "/v1/images/generations"
BODY = {"prompt": "a lighthouse", "size": "256x256", "num_inference_steps": 4}
MAX_QUEUE = 8
NUM_RANKS = 2


@pytest.fixture
async def flooded(connect):
    """A client of a small pool under the policy that serves by default, its engine, and the longest queue seen."""
    executor = FakeExecutor()
    engine = make_engine(executor, policy="tetriserve", max_queue=MAX_QUEUE)
    lengths: list[int] = [0]
    engine.subscribe(lambda observation: lengths.append(len(engine.state.waiting)))
    async with connect(EngineSlot(engine)) as client:
        yield client, engine, lengths
    await engine.stop()


async def flood(client: httpx.AsyncClient, num_requests: int, **fields: object) -> list[httpx.Response]:
    """The answers to requests of which five more are sent for each that is answered, by an image or a refusal.

    Before them one is sent whose deadline any machine meets.
    """

    async def send(**more: object) -> httpx.Response:
        return await client.post(URL, json={**BODY, **fields, **more})

    sending = [asyncio.create_task(send(slo_ms=60_000))]
    for _ in range(num_requests // 5):
        sending += [asyncio.create_task(send()) for _ in range(5)]
        await asyncio.wait([task for task in sending if not task.done()], return_when=asyncio.FIRST_COMPLETED)
    return await asyncio.gather(*sending)


@pytest.mark.parametrize("policy", ["best_effort", "reject"])
async def test_every_answer_is_an_image_or_a_429_that_says_when_to_come_back(flooded, policy):
    client, engine, lengths = flooded
    answers = await flood(client, 120, deadline_policy=policy, slo_ms=600)
    assert {answer.status_code for answer in answers} == {200, 429}
    refusals = [answer for answer in answers if answer.status_code == 429]
    assert all(int(refusal.headers["Retry-After"]) >= 1 for refusal in refusals)
    codes = Counter(refusal.json()["error"]["code"] for refusal in refusals)
    assert set(codes) <= ({"queue_full"} if policy == "best_effort" else {"queue_full", "deadline_infeasible"})
    assert max(lengths) <= MAX_QUEUE + NUM_RANKS  # those that run wait between their tasks
    assert engine.state.trajectories == ()
    assert (await client.post(URL, json=BODY)).status_code == 200


async def test_quotes_do_not_pile_up(flooded, monkeypatch):
    """However slow they are: whoever would wait for long hears so at once, and the rest are answered in turn."""
    monkeypatch.setattr(outlook, "MAX_WAIT_S", 0.05)
    client, engine, _ = flooded
    await asyncio.gather(*(client.post("/v1/quotes", json=BODY) for _ in range(3)))
    answers = await asyncio.gather(*(client.post("/v1/quotes", json=BODY) for _ in range(300)))
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    assert statuses[200] >= 1
    assert {answer.json()["error"]["code"] for answer in answers if answer.status_code == 429} == {"queue_full"}
    assert (await client.post("/v1/quotes", json=BODY)).status_code == 200
