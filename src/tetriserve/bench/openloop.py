"""Sending requests when they are due, whatever became of those before: an open loop.

A closed loop waits for a slow server before it sends more, and so leaves out the very latencies that it should find
(coordinated omission: G. Tene, "How NOT to Measure Latency", 2013). Here nothing waits, unless the operator caps how
many are in flight, and latency counts from when a request was due, so that waiting for the cap counts too.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress

from tetriserve.bench.attempt import Attempt
from tetriserve.bench.tally import Tally
from tetriserve.core.request import Request
from tetriserve.workload.outcome import Outcome, Status

Draw = Callable[[Request], Awaitable[Attempt]]
OnTick = Callable[[Tally, float], None]

TICK_S = 0.5


async def send_all(
    requests: Sequence[Request],
    draw: Draw,
    start_s: float,
    *,
    stop: asyncio.Event,
    max_concurrency: int | None = None,
    on_tick: OnTick | None = None,
) -> Tally:
    """Send every request at `start_s` plus its arrival, by the event loop's clock, and wait for all answers.

    Args:
        stop: once set, nothing more is sent, and requests still running are cancelled.
        max_concurrency: at most so many in flight; None is no cap.
        on_tick: told the tally and the seconds since `start_s`, twice a second and at the end.
    """
    now = asyncio.get_running_loop().time
    tally = Tally(total=len(requests))
    running: dict[str, Request] = {}
    slots: AbstractAsyncContextManager[object] = (
        nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    )

    async def send(request: Request) -> None:
        async with slots:
            attempt = await draw(request)
        del running[request.request_id]
        tally.take(attempt)

    async def send_when_due() -> None:
        async with asyncio.TaskGroup() as group:
            for request in requests:
                delay_s = start_s + request.arrival_s - now()
                if delay_s > 0:
                    await asyncio.sleep(delay_s)
                running[request.request_id] = request
                tally.num_sent += 1
                group.create_task(send(request))

    async with _ticking(on_tick, tally, start_s):
        await _unless_stopped(send_when_due(), stop)
        for request in running.values():
            tally.take(_cancelled(request, now() - start_s))
    return tally


async def _unless_stopped(work: Awaitable[None], stop: asyncio.Event) -> None:
    """Wait for `work` to end, or cancel it once `stop` is set."""
    working, stopping = asyncio.ensure_future(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        working.cancel()
        with suppress(asyncio.CancelledError):
            await working


@asynccontextmanager
async def _ticking(on_tick: OnTick | None, tally: Tally, start_s: float) -> AsyncIterator[None]:
    if on_tick is None:
        yield
        return
    now = asyncio.get_running_loop().time

    async def tick() -> None:
        while True:
            on_tick(tally, now() - start_s)
            await asyncio.sleep(TICK_S)

    ticking = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticking.cancel()
        on_tick(tally, now() - start_s)


def _cancelled(request: Request, finish_s: float) -> Attempt:
    outcome = Outcome(
        request=request,
        status=Status.CANCELLED,
        runs=(),
        predicted_finish_s=math.nan,
        finish_s=finish_s,
        message="the run was interrupted",
    )
    return Attempt(outcome=outcome, sent_s=request.arrival_s)
