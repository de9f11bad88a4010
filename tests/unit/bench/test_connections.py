"""Exchanges over HTTP: connections are kept, every ending has a name."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from tetriserve.bench import connections as module
from tetriserve.bench.address import Address
from tetriserve.bench.connections import Answer, Connections, Unanswered
from tetriserve.core.errors import ConfigError


@pytest.fixture
async def connections(stub) -> AsyncIterator[Connections]:
    connections = Connections(Address.parse(stub.url), "secret")
    yield connections
    connections.close()


async def ask(connections: Connections, timeout_s: float = 30.0) -> Answer:
    return await connections.exchange("POST", "/v1/images/generations", b"{}", timeout_s=timeout_s)


async def test_one_connection_serves_exchanges_that_follow_each_other(stub, connections) -> None:
    answers = [await ask(connections) for _ in range(20)]
    assert [answer.status for answer in answers] == [200] * 20
    assert stub.num_connections == 1


async def test_exchanges_at_once_have_a_connection_each_and_all_are_kept(stub, connections) -> None:
    for _ in range(3):
        await asyncio.gather(*(ask(connections) for _ in range(5)))
    assert stub.num_connections == 5


async def test_a_connection_idle_for_too_long_is_not_used_again(stub, connections, monkeypatch) -> None:
    await ask(connections)
    monkeypatch.setattr(module, "_IDLE_S", -1.0)
    await ask(connections)
    assert stub.num_connections == 2


async def test_the_key_and_the_host_are_sent(stub, connections) -> None:
    await ask(connections)
    head = stub.heads[0].split("\r\n")
    assert "Authorization: Bearer secret" in head
    assert f"Host: 127.0.0.1:{stub.port}" in head


@pytest.mark.parametrize(
    ("sent", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", b"abcde"),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", b"until the end"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok"),
    ],
)
async def test_every_way_to_say_how_long_an_answer_is(stub, connections, sent: bytes, body: bytes) -> None:
    stub.reply = lambda fields: sent
    for _ in range(2):  # the second time it may meet the first one's connection
        assert (await ask(connections)).body == body


@pytest.mark.parametrize(
    ("sent", "timeout_s", "kind", "message"),
    [
        (b"", 30.0, "closed", "the server closed the connection before its answer was complete"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\nabc", 30.0, "closed", "the server closed"),
        (b"SSH-2.0-OpenSSH\r\nConnection: close\r\n\r\n", 30.0, "bad_answer", "not an HTTP answer: "),
        (None, 0.05, "timeout", "no answer within 0.05 s"),
    ],
)
async def test_an_exchange_without_an_answer_says_what_kind_of_failure_it_is(
    stub, connections, sent: bytes | None, timeout_s: float, kind: str, message: str
) -> None:
    stub.reply = lambda fields: sent
    with pytest.raises(Unanswered) as caught:
        await ask(connections, timeout_s)
    assert caught.value.kind == kind
    assert str(caught.value).startswith(message)
    stub.reply = lambda fields: b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    assert (await ask(connections)).body == b"ok"  # on a connection of its own


async def test_a_port_on_which_nobody_listens_is_refused() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = Address.parse(f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(Unanswered, match=f"nothing listens at {address}") as caught:
            await ask(Connections(address, None))
    assert caught.value.kind == "refused"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8091", Address("127.0.0.1", 8091, "", False)),
        ("http://host:8000/v1/", Address("host", 8000, "", False)),
        ("https://api.example.com/openai/v1", Address("api.example.com", 443, "/openai", True)),
        ("http://[::1]:9", Address("::1", 9, "", False)),
    ],
)
def test_urls_are_read_with_and_without_v1(url: str, expected: Address) -> None:
    assert Address.parse(url) == expected
    assert Address.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://", "http://h:port", "http://h:99999", "http://h?q"]
)
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="write it as http://HOST:PORT or https://HOST"):
        Address.parse(url)
