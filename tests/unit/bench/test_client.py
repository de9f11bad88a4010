"""What is sent for a request, and what is made of the answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tetriserve.bench.address import Address
from tetriserve.bench.attempt import Attempt
from tetriserve.bench.client import Client, Wire
from tetriserve.bench.connections import Connections
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, image_stages
from tetriserve.workload.outcome import Status
from tetriserve.workload.slo import TableRule
from tetriserve.workload.traces import load_trace

SCHEDULE = {
    "predicted_finish_s": 0.5,
    "runs": [
        {"stage": "encode", "ranks": [0], "degree": 1, "num_steps": 0, "start_s": 0.0, "end_s": 0.1},
        {"stage": "denoise", "ranks": [0, 1], "degree": 2, "num_steps": 3, "start_s": 0.1, "end_s": 0.4},
        {"stage": "decode", "ranks": [1], "degree": 1, "num_steps": 0, "start_s": 0.4, "end_s": 0.45},
    ],
}


def answer(document: object, status: str = "200 OK") -> bytes:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


@pytest.fixture
async def client(stub) -> AsyncIterator[Callable[..., Client]]:
    connections = Connections(Address.parse(stub.url), None)

    def make(**wire) -> Client:
        known = {"model": None, "timeout_s": 30.0, "extra": {}}
        return Client(connections, Wire(**(known | wire)), asyncio.get_running_loop().time())

    yield make
    connections.close()


async def test_the_body_has_what_the_request_says_and_the_time_left(stub, client, make_request) -> None:
    request = make_request(shape=Shape(height=256, width=512), priority=-1, slo_s=5.0)
    await client(model="flux").draw(request)
    (body,) = stub.bodies
    assert 4000 < body.pop("slo_ms") <= 5000
    assert body == {
        "model": "flux",
        "prompt": "a star",
        "n": 1,
        "size": "512x256",
        "seed": 7,
        "num_inference_steps": 4,
        "priority": -1,
    }


async def test_a_deadline_that_has_passed_still_leaves_a_millisecond_to_ask_for(stub, client, make_request) -> None:
    await client().draw(make_request(slo_s=-3.0))
    assert stub.bodies[0]["slo_ms"] == 1.0


async def test_fields_that_a_strict_server_refuses_can_be_left_out(stub, client, make_request) -> None:
    extra = {"seed": None, "response_format": "b64_json"}
    await client(sends_slo=False, extra=extra).draw(make_request(stages=image_stages(0)))
    assert stub.bodies == [{"prompt": "a star", "n": 1, "size": "512x512", "response_format": "b64_json"}]


async def test_a_peers_answer_is_an_outcome_without_what_only_a_server_knows(
    client, make_request, tmp_path: Path
) -> None:
    request = make_request("r3", arrival_s=-0.5, stages=image_stages(0))  # due half a second ago
    attempt = await client().draw(request)
    assert attempt.outcome.is_attained
    assert attempt.error is None
    assert attempt.lateness_s >= 0.5
    assert attempt.outcome.latency_s >= attempt.lateness_s
    line = attempt.as_json()
    unknown = {"num_steps", "predicted_finish_s", "queued_s", "gpu_time_s", "degrees", "ranks"}
    assert not unknown & line.keys()
    assert line["attained"] is True
    assert line["sent_s"] == attempt.sent_s


async def test_what_tetriserve_tells_of_its_schedule_is_part_of_the_outcome(
    stub, client, make_request, tmp_path: Path
) -> None:
    stub.reply = lambda body: answer({"data": [{"b64_json": "aaaa", "schedule": SCHEDULE}]})
    attempt = await client().draw(make_request(stages=image_stages(0)))
    outcome = attempt.outcome
    assert outcome.degrees == (2, 2, 2)
    assert outcome.request.num_steps == 3
    assert outcome.gpu_time_s == pytest.approx(0.1 + 2 * 0.3 + 0.05)
    assert [run.task.stage for run in outcome.runs] == [ENCODE, DENOISE, DECODE]
    assert outcome.runs[0].start_s == attempt.sent_s
    assert outcome.predicted_finish_s == pytest.approx(attempt.sent_s + 0.5)
    path = tmp_path / "out.jsonl"
    path.write_text(json.dumps(attempt.as_json()))
    (replayed,) = load_trace(path, default_steps=1, deadlines=TableRule())
    assert (replayed.num_steps, replayed.shape, replayed.deadline_s) == (3, Shape(512, 512), 10.0)


@pytest.mark.parametrize("schedule", ["soon", {"runs": 3}, {"runs": [{"stage": "paint"}]}, {"runs": []}, None])
async def test_a_schedule_in_another_form_is_no_mistake(stub, client, make_request, schedule: object) -> None:
    stub.reply = lambda body: answer({"data": [{"url": "http://pictures/1", "schedule": schedule}]})
    attempt = await client().draw(make_request())
    assert (attempt.outcome.status, attempt.outcome.runs) == (Status.FINISHED, ())


ENVELOPE = {"error": {"message": "too many\nwait", "type": "rate_limit_error", "code": "queue_full"}}


@pytest.mark.parametrize(
    ("sent", "error", "message"),
    [
        (answer(ENVELOPE, "429 Too Many Requests"), "http_429", "too many wait"),
        (answer(b"<h1>oops</h1>", "502 Bad Gateway"), "http_502", "<h1>oops</h1>"),
        (answer(b"", "500 Internal Server Error"), "http_500", "no reason given"),
        (answer(b"{truncat"), "bad_answer", "the answer is not JSON: "),
        (answer(b"\xff\xfe"), "bad_answer", "the answer is not JSON: "),
        (answer({"data": []}), "bad_answer", "the answer has no data"),
        (answer({"data": [{"revised_prompt": "x"}]}), "bad_answer", "the answer has neither b64_json nor url"),
        (b"", "closed", "the server closed the connection before its answer was complete"),
    ],
)
async def test_a_failure_is_an_outcome_with_its_kind(
    stub, client, make_request, sent: bytes, error: str, message: str
) -> None:
    stub.reply = lambda body: sent
    attempt: Attempt = await client().draw(make_request())
    assert attempt.outcome.status is Status.FAILED
    assert not attempt.outcome.is_attained
    assert attempt.error == error
    assert attempt.outcome.message.startswith(message)


async def test_pictures_are_kept_only_when_asked_for(client, make_request, tmp_path: Path) -> None:
    await client(images=tmp_path).draw(make_request("../r1"))
    (path,) = tmp_path.iterdir()
    assert path.name == "..%2Fr1.png"
    assert path.read_bytes() == b"\x89PNG\r\n\x1a\n"


async def test_a_picture_that_cannot_be_decoded_is_a_bad_answer(stub, client, make_request, tmp_path: Path) -> None:
    stub.reply = lambda body: answer({"data": [{"b64_json": "***"}]})
    assert (await client(images=tmp_path).draw(make_request())).error == "bad_answer"
    assert (await client().draw(make_request())).error is None  # nobody looks
