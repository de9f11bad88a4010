"""A stub of an images server on a port of its own, in a thread; what it answers is the test's to say."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages


def answer(document: object, status: str = "200 OK") -> bytes:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


PICTURE = answer({"created": 0, "data": [{"b64_json": "iVBORw0KGgo="}]})
NOT_FOUND = answer({"detail": "Not Found"}, "404 Not Found")


@dataclass
class Stub:
    """A running stub.

    reply: from the body of an image request to the bytes that are sent; empty bytes close the connection, None never
        answers. models: the same for `/v1/models`.
    """

    port: int = 0
    reply: Callable[[dict[str, Any]], bytes | None] = lambda body: PICTURE
    models: bytes = NOT_FOUND
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    num_connections: int = 0
    on_request: Callable[[], None] = lambda: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().partition("content-length:")[2].split("\r\n")[0])
                body = await reader.readexactly(length)
                self.heads.append(head)
                if head.startswith("GET /v1/models "):
                    sent: bytes | None = self.models
                else:
                    self.bodies.append(json.loads(body))
                    self.on_request()
                    sent = self.reply(self.bodies[-1])
                if sent is None:
                    await reader.read()
                elif sent:
                    writer.write(sent)
                if not sent or b"Connection: close" in sent or b"Length" not in sent and b"chunked" not in sent:
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(stub.serve, "127.0.0.1", 0))
    stub.port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield stub

    async def stop() -> None:
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("TETRISERVE_") or name == "OPENAI_API_KEY":
            monkeypatch.delenv(name)


@pytest.fixture
def make_request() -> Callable[..., Request]:
    def make(name: str = "r0", arrival_s: float = 0.0, slo_s: float = 10.0, **fields: Any) -> Request:
        known = {"prompt": "a star", "shape": Shape(512, 512), "stages": image_stages(4), "seed": 7}
        return Request(request_id=name, arrival_s=arrival_s, deadline_s=arrival_s + slo_s, **(known | fields))

    return make
