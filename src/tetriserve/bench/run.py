"""From a load to measurements: check the server, warm it up, send, and stop early when asked to."""

from __future__ import annotations

import asyncio
import resource
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from tetriserve.bench.check import find_target
from tetriserve.bench.client import Client, Wire
from tetriserve.bench.connections import Connections
from tetriserve.bench.load import NoDeadline
from tetriserve.bench.openloop import OnTick, send_all
from tetriserve.bench.session import Measurement, Session
from tetriserve.bench.target import Target
from tetriserve.core.errors import ConfigError
from tetriserve.core.request import Request, Shape

_LEAD_S = 0.1
"""Between the last preparation and the first request, so that the first one is not late."""

Say = Callable[[str], None]


async def measure(
    session: Session,
    *,
    on_tick: OnTick | None = None,
    say: Say = lambda text: None,
    warn: Say = lambda text: None,
) -> Measurement:
    """Run the session. An interrupt (SIGINT) while requests are sent ends it early, with what is known by then.

    Args:
        say: told what is done before the first request.
        warn: told what went wrong there without being fatal.

    Raises:
        ConfigError: an option cannot be used, or the server cannot be measured; said before the load begins.
    """
    now = asyncio.get_running_loop().time
    connections = Connections(session.address, session.api_key)
    try:
        say("checking the server")
        target = await find_target(connections, session.model) if session.is_checked else Target(model=session.model)
        load = session.load
        if load.slo_multiple is None:
            draft = requests = load.requests(target, load.deadlines({}))
            await _warm_up(session, target, connections, draft, say, warn)
        else:
            draft = load.requests(target, NoDeadline())
            alone_s = await _warm_up(session, target, connections, draft, say, warn)
            requests = load.requests(target, load.deadlines(alone_s))
        _allow_open_files(len(requests))
        stop = asyncio.Event()
        start_s, start_cpu_s = now() + _LEAD_S, time.process_time()
        client = Client(connections, _wire(session, target), start_s)
        with _on_interrupt(stop):
            tally = await send_all(
                requests, client.draw, start_s, stop=stop, max_concurrency=session.max_concurrency, on_tick=on_tick
            )
        return Measurement(
            target=target,
            attempts=tally.attempts,
            total=len(requests),
            duration_s=max((attempt.outcome.finish_s for attempt in tally.attempts), default=0.0),
            cpu_s=time.process_time() - start_cpu_s,
            is_interrupted=stop.is_set(),
        )
    finally:
        connections.close()


async def _warm_up(
    session: Session, target: Target, connections: Connections, requests: Sequence[Request], say: Say, warn: Say
) -> dict[Shape, float]:
    """Send some requests of each size, one at a time; the median seconds that each size took alone.

    Raises:
        ConfigError: deadlines depend on a size of which no request finished.
    """
    wire = replace(_wire(session, target), sends_slo=False, images=None)
    alone_s: dict[Shape, float] = {}
    first_of = {request.shape: request for request in reversed(requests)} if session.num_warm_ups else {}
    for shape in sorted(first_of, key=lambda shape: (shape.num_pixels, shape)):
        say(f"warming up: {shape}")
        client = Client(connections, wire, asyncio.get_running_loop().time())
        attempts = [await client.draw(first_of[shape]) for _ in range(session.num_warm_ups)]
        failed = [attempt for attempt in attempts if attempt.error is not None]
        if failed:
            last = failed[-1]
            problem = (
                f"warm-up of {shape}: {len(failed)} of {len(attempts)} failed, {last.error}: {last.outcome.message}"
            )
            if len(failed) == len(attempts) and session.load.slo_multiple is not None:
                raise ConfigError(f"{problem}; slo-multiple needs one to finish")
            warn(problem)
        if len(failed) < len(attempts):
            alone_s[shape] = statistics.median(
                attempt.outcome.finish_s - attempt.sent_s for attempt in attempts if attempt.error is None
            )
    return alone_s


def _wire(session: Session, target: Target) -> Wire:
    return Wire(
        model=target.model,
        timeout_s=session.timeout_s,
        sends_slo=session.sends_slo,
        extra=session.extra,
        images=session.images,
    )


@contextmanager
def _on_interrupt(stop: asyncio.Event) -> Iterator[None]:
    """The first SIGINT sets `stop`; the second one does what it always does."""
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop.set()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _allow_open_files(num_more: int) -> None:
    """An overloaded server has every request in flight at once, each with a socket of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + num_more if hard == resource.RLIM_INFINITY else min(soft + num_more, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
