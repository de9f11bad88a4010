"""What the load generator costs, and how punctual it is: against a stub server in a process of its own.

Bars: at 200 requests per second below 5 % of a core, and the 99th percentile of how late sends are below 5 ms. The live
view is drawn, as on a terminal. With --clients, the same load through other HTTP clients too. Run with

    python benchmarks/bench_overhead.py [--rate 200] [--seconds 20] [--clients]
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection

from rich.console import Console

from tetriserve.bench.address import Address
from tetriserve.bench.connections import Connections
from tetriserve.bench.load import Load
from tetriserve.bench.run import measure
from tetriserve.bench.session import Session
from tetriserve.bench.summary import summarise
from tetriserve.report.watching import Watch

BAR_SHARE = 0.05
BAR_LATE_S = 0.005
SERVICE_S = 0.05
BODY = json.dumps({"created": 0, "data": [{"b64_json": "A" * 4096}]}).encode()
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY

Post = Callable[[bytes], Coroutine[None, None, int]]


class Stub(asyncio.Protocol):
    """Answers every request with the same picture after `SERVICE_S`."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0) if found else 0
        if found and len(body) >= length:
            self.received = b""
            asyncio.get_running_loop().call_later(SERVICE_S, self.transport.write, ANSWER)


def serve_stub(port_to: Connection) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", 0)
        port_to.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


async def measure_bench(port: int, rate_per_s: float, seconds: float) -> bool:
    """Print the bench's own cost and punctuality; whether both are within the bars."""
    load = Load(rate_per_min=60 * rate_per_s, num_requests=int(rate_per_s * seconds))
    session = Session(address=Address.parse(f"http://127.0.0.1:{port}"), load=load)
    with Watch(Console(file=io.StringIO(), force_terminal=True, width=120)) as watch:
        summary = summarise(await measure(session, on_tick=watch.show, say=watch.say))
    print(f"{summary.everything.num_finished} of {load.num_requests} finished at {rate_per_s:g}/s")
    print(f"CPU: {summary.cpu_share:.1%} of a core (bar {BAR_SHARE:.0%})")
    print(
        f"late: p50 {1000 * summary.lateness_p50_s:.2f} ms, p99 {1000 * summary.lateness_p99_s:.2f} ms "
        f"(bar {1000 * BAR_LATE_S:g} ms), at most {1000 * summary.lateness_max_s:.2f} ms"
    )
    is_whole = summary.everything.num_finished == load.num_requests
    return is_whole and summary.cpu_share < BAR_SHARE and summary.lateness_p99_s < BAR_LATE_S


@asynccontextmanager
async def ours(url: str) -> AsyncIterator[Post]:
    connections = Connections(Address.parse(url), None)

    async def post(body: bytes) -> int:
        return (await connections.exchange("POST", "/v1/images/generations", body, timeout_s=60)).status

    yield post
    connections.close()


@asynccontextmanager
async def with_httpx(url: str) -> AsyncIterator[Post]:
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=60, trust_env=False) as client:

        async def post(body: bytes) -> int:
            return (await client.post(f"{url}/v1/images/generations", content=body)).status_code

        yield post


@asynccontextmanager
async def with_aiohttp(url: str) -> AsyncIterator[Post]:
    import aiohttp  # not a dependency: pip install aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:

        async def post(body: bytes) -> int:
            async with client.post(f"{url}/v1/images/generations", data=body) as answer:
                await answer.read()
                return int(answer.status)

        yield post


@asynccontextmanager
async def nothing(url: str) -> AsyncIterator[Post]:
    async def post(body: bytes) -> int:
        await asyncio.sleep(SERVICE_S)
        return 200

    yield post


async def compare_clients(port: int, rate_per_s: float, seconds: float) -> None:
    """Print CPU time per exchange of several clients at a constant pace; `no client` is the loop alone."""
    clients = {"no client": nothing, "tetriserve.bench": ours, "aiohttp": with_aiohttp, "httpx": with_httpx}
    for name, client in clients.items():
        try:
            async with client(f"http://127.0.0.1:{port}") as post:
                await asyncio.gather(*(post(BODY) for _ in range(20)))
                start_cpu_s, num_sent = time.process_time(), int(rate_per_s * seconds)
                start_s = time.monotonic()
                async with asyncio.TaskGroup() as group:
                    for number in range(num_sent):
                        await asyncio.sleep(max(0.0, start_s + number / rate_per_s - time.monotonic()))
                        group.create_task(post(BODY))
                each_s = (time.process_time() - start_cpu_s) / num_sent
        except ModuleNotFoundError as error:
            print(f"{name:17} {error}")
            continue
        print(f"{name:17} {1e6 * each_s:5.0f} us per request, {each_s * rate_per_s:.1%} of a core at {rate_per_s:g}/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=200.0, help="requests per second")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--clients", action="store_true", help="also the cost of other HTTP clients")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    port_from, port_to = context.Pipe(duplex=False)
    stub = context.Process(target=serve_stub, args=(port_to,), daemon=True)
    stub.start()
    try:
        port = port_from.recv()
        is_good = asyncio.run(measure_bench(port, options.rate, options.seconds))
        if options.clients:
            asyncio.run(compare_clients(port, options.rate, min(options.seconds, 5.0)))
    finally:
        stub.kill()
    raise SystemExit(0 if is_good else 1)


if __name__ == "__main__":
    main()
