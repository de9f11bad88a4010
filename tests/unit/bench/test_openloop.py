"""The open loop: nothing waits for answers, and waiting that the operator asked for counts."""

from __future__ import annotations

import asyncio

import pytest

from tests.waiting import HANG_S
from tetriserve.bench.attempt import Attempt
from tetriserve.bench.openloop import send_all
from tetriserve.workload.outcome import Outcome, Status


def finished(request, sent_s: float, finish_s: float) -> Attempt:
    outcome = Outcome(request=request, status=Status.FINISHED, runs=(), predicted_finish_s=0.0, finish_s=finish_s)
    return Attempt(outcome=outcome, sent_s=sent_s)


class Server:
    """Answers a request `service_s` after it was sent; while `gate` is clear, not at all."""

    def __init__(self, start_s: float, service_s: float = 0.0) -> None:
        self.start_s, self.service_s = start_s, service_s
        self.gate = asyncio.Event()
        self.gate.set()
        self.seen: list[str] = []
        self.num_now = self.num_most = 0

    async def draw(self, request) -> Attempt:
        loop = asyncio.get_running_loop()
        sent_s = loop.time() - self.start_s
        self.seen.append(request.request_id)
        self.num_now += 1
        self.num_most = max(self.num_most, self.num_now)
        await asyncio.sleep(self.service_s)
        await self.gate.wait()
        self.num_now -= 1
        return finished(request, sent_s, loop.time() - self.start_s)


@pytest.fixture
async def start_s() -> float:
    return asyncio.get_running_loop().time()


async def test_a_server_that_stalls_does_not_hold_requests_back(make_request, start_s: float) -> None:
    server = Server(start_s)
    server.gate.clear()
    requests = [make_request(f"r{number}", arrival_s=number * 0.005) for number in range(8)]

    async def open_once_all_came() -> None:
        async with asyncio.timeout(HANG_S):
            while len(server.seen) < 8:
                await asyncio.sleep(0.001)
        server.gate.set()

    tally, _ = await asyncio.gather(
        send_all(requests, server.draw, start_s, stop=asyncio.Event()), open_once_all_came()
    )
    assert server.num_most == 8
    assert tally.num_finished == 8
    assert max(attempt.outcome.latency_s for attempt in tally.attempts) >= 0.035  # the first waited for the last


async def test_nothing_is_sent_before_it_is_due(make_request, start_s: float) -> None:
    requests = [make_request(f"r{number}", arrival_s=number * 0.01) for number in range(5)]
    tally = await send_all(requests, Server(start_s).draw, start_s, stop=asyncio.Event())
    assert [attempt.outcome.request.request_id for attempt in tally.attempts] == ["r0", "r1", "r2", "r3", "r4"]
    assert all(attempt.lateness_s >= 0 for attempt in tally.attempts)


async def test_waiting_for_the_cap_counts_as_latency_and_as_lateness(make_request, start_s: float) -> None:
    server = Server(start_s, service_s=0.02)
    requests = [make_request(f"r{number}") for number in range(3)]
    tally = await send_all(requests, server.draw, start_s, stop=asyncio.Event(), max_concurrency=1)
    assert server.num_most == 1
    for number, attempt in enumerate(tally.attempts):
        assert attempt.lateness_s >= 0.019 * number
        assert attempt.outcome.latency_s >= 0.019 * (number + 1)


async def test_stopping_sends_no_more_and_tells_what_was_cut_short(make_request, start_s: float) -> None:
    server, stop = Server(start_s), asyncio.Event()
    requests = [make_request("done"), make_request("running"), make_request("unsent", arrival_s=1000.0)]

    async def draw(request) -> Attempt:
        if request.request_id == "running":
            stop.set()
            await asyncio.Event().wait()
        return await server.draw(request)

    tally = await send_all(requests, draw, start_s, stop=stop)
    statuses = {attempt.outcome.request.request_id: attempt.outcome.status for attempt in tally.attempts}
    assert statuses == {"done": Status.FINISHED, "running": Status.CANCELLED}
    assert (tally.num_sent, tally.num_running, tally.num_cancelled) == (2, 0, 1)


async def test_whoever_watches_sees_the_counts_grow_and_at_last_all_of_them(make_request, start_s: float) -> None:
    seen: list[tuple[int, int]] = []
    requests = [make_request(f"r{number}", arrival_s=0.01, slo_s=-1.0 if number == 0 else 60.0) for number in range(4)]
    tally = await send_all(
        requests,
        Server(start_s).draw,
        start_s,
        stop=asyncio.Event(),
        on_tick=lambda tally, elapsed_s: seen.append((tally.num_sent, tally.num_attained)),
    )
    assert seen[0] == (0, 0)
    assert seen[-1] == (4, 3)
    assert tally.latencies_s == sorted(tally.latencies_s)
