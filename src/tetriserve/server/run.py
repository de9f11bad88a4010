"""Runs the app: listen at once, launch the engine meanwhile, finish what was accepted before going."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Generator
from typing import TYPE_CHECKING, Any

import uvicorn

from tetriserve.config import ServerConfig
from tetriserve.core.errors import ConfigError
from tetriserve.engine import Jobs, LiveEngine
from tetriserve.server.access import is_local_name
from tetriserve.server.app import create_app
from tetriserve.server.connection import BACKLOG, BoundedProtocol, LoopErrors, raise_file_limit
from tetriserve.server.slot import EngineSlot
from tetriserve.stopping import HardStop, caught_signals

if TYPE_CHECKING:
    from tetriserve.server.tracing import Tracing

logger = logging.getLogger(__name__)

OnReady = Callable[[str, LiveEngine], None]

_IDLE_S = 75
"""A connection without a request is kept this long: longer than clients keep theirs, so that they close first."""
_REFUSALS_S = 0.5
"""How long requests are refused at least before the port is closed: those sent before their client knew of the stop."""
_LAST_ANSWERS_S = 5
"""How long clients may take to read their answers once the engine has stopped."""
_HARD_STOP_S = 15.0
"""Beyond `shutdown_timeout_s`: for clients to read, and for workers to be killed that hang."""


def _log_ready(url: str, engine: LiveEngine) -> None:
    logger.info("serving %s on %s", engine.models.title, url)


async def serve(
    config: ServerConfig,
    launch: Callable[[], Awaitable[Jobs]],
    *,
    on_ready: OnReady = _log_ready,
    on_stop: Callable[[], None] = lambda: None,
) -> int:
    """Serve until a signal says stop; the exit code. Call it on the main thread, which receives signals.

    The port is open before `launch` begins, and answers 503 until it is done; then `on_ready` hears URL and engine. The
    first SIGTERM or SIGINT (`on_stop` hears of it) ends admission, waits up to `config.shutdown_timeout_s` for accepted
    requests, and leads to 0. A second one ends at once, and leads to 128 plus its number, as does the first while
    `launch` is at work, which is cancelled.

    Raises:
        ConfigError: the port cannot be had, or `launch` raised it.
    """
    tracing = None if config.otlp_traces_endpoint is None else _open_tracing(config.otlp_traces_endpoint)
    listener = listen(config.host, config.port)
    is_local = is_local_name(listener.getsockname()[0])
    if not is_local and not config.access.api_keys:
        logger.warning("anyone who reaches %s can use this server; --api-key guards it", config.host)
    raise_file_limit()
    asyncio.get_running_loop().set_exception_handler(LoopErrors())
    slot = EngineSlot()
    server = _Server(
        uvicorn.Config(
            create_app(slot, config.access, tracing, config.api, is_local=is_local),
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            http=BoundedProtocol,
            backlog=BACKLOG,
            timeout_keep_alive=_IDLE_S,
            timeout_graceful_shutdown=_LAST_ANSWERS_S,
        )
    )
    signals: asyncio.Queue[int] = asyncio.Queue()

    def take(number: int) -> None:
        if signals.empty():
            on_stop()
        signals.put_nowait(number)

    with caught_signals(take):
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            jobs = await _launched(launch, signals)
            if isinstance(jobs, int):
                return 128 + jobs
            try:
                slot.put(jobs.engine, jobs)
                gc.freeze()  # modules and types, 90,000 objects: collections of the oldest generation would walk them
                on_ready(url_of(listener), jobs.engine)
                await signals.get()
            finally:
                hurried_by = await _drain(jobs, config.shutdown_timeout_s, signals)
            server.force_exit = hurried_by is not None
            return 0 if hurried_by is None else 128 + hurried_by
        finally:
            server.should_exit = True
            await serving
            gc.unfreeze()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)


def _open_tracing(endpoint: str) -> Tracing:
    try:
        from tetriserve.server.tracing import open_tracing
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"otlp-traces-endpoint needs the package {error.name}; install it with: pip install 'tetriserve[otel]'"
        ) from None
    return open_tracing(endpoint)


def run_server(config: ServerConfig, launch: Callable[[], Awaitable[Jobs]], *, on_ready: OnReady = _log_ready) -> int:
    """`serve` on an event loop of its own. Some seconds after `shutdown_timeout_s` the process ends, whatever hangs."""
    hard_stop = HardStop(config.shutdown_timeout_s + _HARD_STOP_S)

    async def main() -> int:
        hard_stop.exit_code = await serve(config, launch, on_ready=on_ready, on_stop=hard_stop.arm)
        return hard_stop.exit_code

    with hard_stop:
        return asyncio.run(main())


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ConfigError: one line says why not and how to mend it.
    """
    host = host.removeprefix("[").removesuffix("]")  # as URLs write an IPv6 address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
        # Accepted sockets inherit it. asyncio sets it only where a socket names its protocol, and these do not: the
        # body of an answer then waits for the acknowledgement of its head, which clients delay by 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = f"port {port} on {host} is in use; stop what uses it or choose another with --port (0: a free one)"
        elif error.errno == errno.EACCES:
            reason = f"port {port} on {host} is not allowed to this user; choose one above 1023 with --port"
        else:
            reason = f"cannot listen on {host} port {port}: {error.strerror}; give an address of this machine as --host"
        raise ConfigError(reason) from None


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine reaches it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Without uvicorn's signal handlers: they close the port while accepted requests still run."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def _launched(launch: Callable[[], Awaitable[Jobs]], signals: asyncio.Queue[int]) -> Jobs | int:
    """The jobs above an engine; the signal when one came first, and then nothing is left of the engine."""
    launching = asyncio.ensure_future(launch())
    number = await _signal_during(launching, signals)
    if number is None:
        return launching.result()
    logger.info("stopped by %s while starting", signal.Signals(number).name)
    launching.cancel()
    await asyncio.wait({launching})
    if not launching.cancelled() and launching.exception() is None:  # the signal came just after it was done
        await launching.result().stop()
    return number


async def _drain(jobs: Jobs, timeout_s: float, signals: asyncio.Queue[int]) -> int | None:
    """Stop the engine; the signal that hurried it, if one did."""
    logger.info("shutting down; accepted requests have %g s to finish", timeout_s)
    stopping = asyncio.gather(jobs.stop(timeout_s), asyncio.sleep(_REFUSALS_S))
    number = await _signal_during(stopping, signals)
    if number is not None:
        stopping.cancel()
        await asyncio.gather(stopping, return_exceptions=True)
        await jobs.stop()
    return number


async def _signal_during(task: asyncio.Future[Any], signals: asyncio.Queue[int]) -> int | None:
    """The signal that arrives before `task` is done; None if it is done first."""
    signalled = asyncio.create_task(signals.get())
    try:
        await asyncio.wait((task, signalled), return_when=asyncio.FIRST_COMPLETED)
        return signalled.result() if signalled.done() else None
    finally:
        signalled.cancel()
