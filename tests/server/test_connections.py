"""What clients can do to a connection: stall, pipeline, send nonsense, open many. Nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.waiting import HANG_S, until
from tetriserve.server import connection
from tetriserve.server.connection import ARRIVAL_S

URL = "/v1/images/generations"
BODY = json.dumps({"prompt": "a lighthouse", "size": "64x64"}).encode()
POST = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
WHOLE = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
async def http(live):
    async with httpx.AsyncClient(base_url=await live.url, timeout=HANG_S) as client:
        yield client


async def connect(live):
    host, port = (await live.url).removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def answer_to(live, *pieces, then_s=0.0):
    """All that the server says to `pieces`, until it closes."""
    reader, writer = await connect(live)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(then_s)
    answer = await asyncio.wait_for(reader.read(), HANG_S)
    writer.close()
    return answer


STALLED = {
    "half a request line": b"GET /hea",
    "half a header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
    "no body": POST + b"Content-Length: 100\r\n\r\n",
    "half a body": POST + b'Content-Length: 100\r\n\r\n{"prompt": "',
    "half a chunk": POST + b'Transfer-Encoding: chunked\r\n\r\n200\r\n{"prompt": ',
}


@pytest.mark.parametrize("piece", STALLED.values(), ids=STALLED)
async def test_a_request_that_does_not_go_on_is_a_408_and_disturbs_nobody(clock, live, http, piece):
    stalling = [asyncio.create_task(answer_to(live, piece)) for _ in range(20)]
    assert (await http.post(URL, content=BODY, headers={"Content-Type": "application/json"})).status_code == 200
    await clock.until(lambda: all(answer.done() for answer in stalling), 2 * ARRIVAL_S)
    for answer in await asyncio.gather(*stalling):
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(body)["error"]["code"] == "request_timeout"
    assert live.engine.state.trajectories == ()


async def test_a_body_that_does_not_arrive_is_counted_and_logged_as_the_408_that_it_is(clock, live, http, caplog):
    with caplog.at_level(logging.INFO, "tetriserve"):
        stalling = asyncio.create_task(answer_to(live, STALLED["half a body"]))
        await clock.until(stalling.done, 2 * ARRIVAL_S)
        metrics = (await http.get("/metrics")).text
    assert 'route="/v1/images/generations",status="408"} 1.0' in metrics
    assert metrics.count('route="/v1/images/generations"') == 2  # with its _created
    (line,) = [record.getMessage() for record in caplog.records if "generations" in record.getMessage()]
    assert " 408 in " in line
    assert line.endswith("code=request_timeout")


@pytest.mark.parametrize("piece", STALLED.values(), ids=STALLED)
async def test_dripping_bytes_gain_no_time(clock, live, piece):
    reader, writer = await connect(live)
    writer.write(piece)
    reading = asyncio.create_task(reader.read())

    def has_ended():
        writer.write(b" ")
        return reading.done()

    await clock.until(has_ended, 2 * ARRIVAL_S)
    writer.close()
    if not isinstance(reading.exception(), ConnectionError):  # the server closes without reading what still came
        assert b" 408 " in reading.result()


async def test_the_time_counts_anew_for_every_request_and_not_while_it_is_served(clock, live, executor):
    executor.gate.clear()
    reader, writer = await connect(live)
    writer.write(WHOLE)
    await until(lambda: live.engine.state.trajectories)
    await clock.pass_by(1.5 * ARRIVAL_S)
    executor.gate.set()
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    await clock.pass_by(1.5 * ARRIVAL_S)  # idle between two requests
    writer.write(GET[:9])
    await clock.pass_by(0.5 * ARRIVAL_S)
    writer.write(GET[9:])
    assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b'{"status":"alive"}'), HANG_S)
    writer.close()


async def test_the_rest_of_a_body_that_nobody_reads_is_not_waited_for(clock, live):
    """The answer needs no body, so it comes at once; the connection still ends in time."""
    reader, writer = await connect(live)
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n")
    assert (await reader.readuntil(b"alive")).startswith(b"HTTP/1.1 200 ")
    reading = asyncio.create_task(reader.read())
    await clock.until(reading.done, 2 * ARRIVAL_S)
    assert b"HTTP/1.1" not in reading.result()
    writer.close()


async def test_a_connection_without_a_request_is_closed_after_a_while(live, monkeypatch):
    def idle_briefly(self, transport):
        self.timeout_keep_alive = 0.1
        made(self, transport)

    made = connection.BoundedProtocol.connection_made
    monkeypatch.setattr(connection.BoundedProtocol, "connection_made", idle_briefly)
    assert await answer_to(live) == b""


async def test_pipelined_requests_are_answered_in_order(live):
    last = b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = await answer_to(live, GET + WHOLE + GET + last)
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200"] * 4
    assert answer.index(b"alive") < answer.index(b"b64_json") < answer.rindex(b"alive") < answer.index(b'"ready"')


async def test_the_second_of_two_pipelined_requests_may_not_stall_either(clock, live):
    reader, writer = await connect(live)
    writer.write(WHOLE + STALLED["half a body"])
    assert (await reader.readuntil(b"b64_json")).startswith(b"HTTP/1.1 200 ")
    reading = asyncio.create_task(reader.read())
    await clock.until(reading.done, 2 * ARRIVAL_S)
    assert [part[:3] for part in reading.result().split(b"HTTP/1.1 ")[1:]] == [b"408"]
    writer.close()


NONSENSE = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "a negative length": POST + b"Content-Length: -5\r\n\r\n",
    "a length of many digits": POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "a chunk that is none": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a NUL in a header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n",
}


@pytest.mark.parametrize("piece", NONSENSE.values(), ids=NONSENSE)
async def test_nonsense_is_a_400_in_the_envelope_without_a_traceback(live, http, piece, caplog):
    with caplog.at_level(logging.DEBUG):
        answer = await answer_to(live, piece)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert not [record for record in caplog.records if record.exc_info]
    assert (await http.get("/health")).status_code == 200


@pytest.mark.parametrize("line", [b"X: " + b"a" * 2**20, b"X: aaaaaaaaaa\r\n" * 2**16, b"a" * 2**20])
async def test_headers_without_an_end_are_refused(live, http, line):
    """What one read brings is parsed; beyond that 64 KiB may be unfinished."""
    reader, writer = await connect(live)
    with contextlib.suppress(ConnectionError):  # it closes without reading the rest
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + line)
        await writer.drain()
        answer = await asyncio.wait_for(reader.read(), HANG_S)
        assert answer.startswith(b"HTTP/1.1 400 ")
    writer.close()
    assert (await http.get("/health")).status_code == 200


async def test_nonsense_after_an_answer_has_begun_closes_the_connection_without_a_traceback(live, caplog):
    """The answer to a route that reads no body is out before the body turns out to be no body."""
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = await answer_to(live, head, b"zz\r\n", then_s=0.1)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert not [record for record in caplog.records if record.exc_info]


async def test_many_idle_connections_take_nothing_from_others(live, http):
    idle = [await connect(live) for _ in range(200)]
    assert (await http.post(URL, content=BODY, headers={"Content-Type": "application/json"})).status_code == 200
    for _, writer in idle:
        writer.close()


async def test_more_connections_than_there_may_be_are_a_503_that_says_when_to_come_back(live, monkeypatch):
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 3)
    kept = [await connect(live) for _ in range(3)]
    for reader, writer in kept:
        writer.write(GET)
        await reader.readuntil(b"alive")
    answer = await answer_to(live)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 5\r\n" in answer.lower()
    assert b'"too_many_connections"' in answer
    for _, writer in kept:
        writer.close()
    async with asyncio.timeout(HANG_S):
        while b"alive" not in await answer_to(live, GET.replace(b"Host", b"Connection: close\r\nHost")):
            await asyncio.sleep(0.005)  # until the server knows that they are closed


@pytest.mark.parametrize("framing", [b"Content-Length: 1073741824", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize(("keys", "status"), [((), b"413"), (("a-key",), b"401")])
async def test_a_body_that_is_refused_is_not_read_to_its_end(start_live, framing, keys, status):
    """A gigabyte is sent; what is not read fills buffers of a few megabytes."""
    live = start_live(api_keys=keys)
    reader, writer = await connect(live)
    writer.write(POST + framing + b"\r\n\r\n")
    piece = b" " * 2**16 if b"Length" in framing else b"10000\r\n" + b" " * 2**16 + b"\r\n"
    num_sent = 0
    answering = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
    with contextlib.suppress(ConnectionError):
        while num_sent < 2**30:
            writer.write(piece)
            await writer.drain()
            num_sent += len(piece)
    writer.close()
    await live.stop()
    assert num_sent < 2**26
    assert (await answering).startswith(b"HTTP/1.1 " + status)


async def test_after_a_refusal_of_a_small_body_the_connection_goes_on(start_live):
    live = start_live(api_keys=("a-key",))
    reader, writer = await connect(live)
    for _ in range(2):
        writer.write(POST + b"Content-Length: 100000\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401 ")
        await reader.readuntil(b"}}")
        writer.write(b" " * 100_000)
    writer.write(GET)
    assert (await reader.readuntil(b"alive")).startswith(b"HTTP/1.1 200 ")
    writer.close()
    await live.stop()


async def test_a_storm_of_connections_leaves_a_few_lines_and_a_server_that_answers(tmp_path):
    """300 connections at once to a process that may open 200 files, and is busy as they come."""
    log = tmp_path / "log"
    program = Path(__file__).with_name("fake_engine.py")
    command = ["bash", "-c", "ulimit -Sn 100 && ulimit -Hn 200 && exec $0 $1", sys.executable, str(program)]
    with log.open("wb") as file, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True) as program:
        assert program.stdout.readline() == "launching\n"
        host, port = program.stdout.readline().strip().removeprefix("http://").split(":")
        program.send_signal(signal.SIGSTOP)
        opening = [asyncio.create_task(asyncio.open_connection(host, int(port))) for _ in range(300)]
        await asyncio.wait(opening, timeout=0.5)  # what the backlog holds
        program.send_signal(signal.SIGCONT)
        opened = await asyncio.gather(*opening, return_exceptions=True)
        opened = [pair for pair in opened if not isinstance(pair, Exception)]
        for _, writer in opened:
            writer.write(GET)
        answers = await asyncio.gather(
            *(asyncio.wait_for(reader.read(2**16), HANG_S) for reader, _ in opened), return_exceptions=True
        )
        for _, writer in opened:
            writer.close()
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=HANG_S) as http:
            assert (await http.post(URL, content=BODY, headers={"Content-Type": "application/json"})).status_code == 200
        program.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(program.wait, HANG_S) == 0
    served = [answer for answer in answers if isinstance(answer, bytes) and b" 200 OK" in answer]
    assert len(served) >= 90, "half of the raised limit, but for a few"
    assert "Traceback" not in log.read_text()
    assert len(log.read_text().splitlines()) < 10


async def test_that_no_file_is_left_for_connections_is_one_line_and_other_errors_are_logged_in_full(caplog):
    loop, handle = asyncio.get_running_loop(), connection.LoopErrors()
    for number in (errno.EMFILE, errno.ENFILE) * 5:
        handle(loop, {"message": "accept failed", "exception": OSError(number, "Too many open files"), "socket": None})
    handle(loop, {"message": "a callback failed", "exception": OSError(errno.EMFILE, "Too many open files")})
    first, second = caplog.records
    assert first.getMessage().startswith("connections wait to be accepted: Too many open files;")
    assert first.exc_info is None
    assert second.getMessage() == "a callback failed"
    assert second.exc_info is not None


async def test_an_upgrade_to_a_protocol_that_is_not_spoken_is_ignored(live):
    upgrade = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\n\r\n"
    assert (await answer_to(live, upgrade)).startswith(b"HTTP/1.1 200 ")
