"""A mixed load that checks every answer: plain and streamed, one image or two, with deadlines and without."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx

from tests.faults.pictures import TOLERANCE, Gallery, Picture
from tests.faults.server import Server
from tests.waiting import HANG_S

FLOOD = 24
"""Requests at once, which the queue cannot hold."""

_ROUTE = "/v1/images/generations"
_GARBAGE = (
    b"\x00\xff\xfe" * 200,
    b"GET /v1/models HTTP/banana\r\n\r\n",
    b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n{",
    b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b'POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 12\r\n\r\n{"prompt": 7}',
    b"\r\n" * 50 + b"A" * 70_000,
)


@dataclass
class Tally:
    """What became of requests, by kind of answer, and what was wrong.

    distances: images by their largest difference from the reference, 0 to 255.
    """

    sent: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    distances: Counter[int] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)

    @property
    def num_wrong(self) -> int:
        return sum(count for distance, count in self.distances.items() if distance > TOLERANCE)


class Clients:
    """Ask `server` for pictures of `catalogue` until told to stop. Everything is drawn from `random`."""

    def __init__(
        self, server: Server, catalogue: Sequence[tuple[Picture, Picture]], gallery: Gallery, random: Random
    ) -> None:
        self.tally = Tally()
        self._server = server
        self._catalogue = catalogue
        self._gallery = gallery
        self._random = random
        self._http = httpx.AsyncClient(base_url=server.url, timeout=HANG_S, limits=httpx.Limits(max_connections=200))
        self._is_over = False

    async def ask_for_long(self, pause_s: float) -> None:
        """One client, with pauses of `pause_s` on average, until `finish`."""
        while not self._is_over:
            await self.ask_once()
            await asyncio.sleep(self._random.expovariate(1 / pause_s))

    def finish(self) -> None:
        self._is_over = True

    async def close(self) -> None:
        await self._http.aclose()

    async def ask_once(self) -> None:
        """One request of a kind drawn by lot, and a look at its answer."""
        pair = self._random.choice(self._catalogue)
        is_both, is_stream, has_slo = (self._random.random() < share for share in (0.15, 0.2, 0.4))
        pictures = pair if is_both else (self._random.choice(pair),)
        body = _body(pictures)
        if has_slo:
            body["slo_ms"] = self._random.choice([300, 1000, 3000, 10_000])
        if is_stream:
            body |= {"stream": True, "partial_images": self._random.randint(0, 2)}
        await self._send(body, pictures)

    async def leave(self) -> None:
        """Ask, and close the connection before the answer is there, if it is not quick."""
        pictures = self._random.choice(self._catalogue)
        body = _body(pictures[:1]) | {"stream": self._random.random() < 0.5, "num_inference_steps": 40}
        self.tally.sent += 1
        try:
            await asyncio.wait_for(self._http.post(_ROUTE, json=body), self._random.uniform(0.0, 1.0))
            self.tally.answers["dropped, too late"] += 1
        except TimeoutError:
            self.tally.answers["dropped by the client"] += 1
        except httpx.HTTPError as error:
            self._note_break(f"{type(error).__name__} of a client that would have left")

    async def flood(self) -> None:
        """More at once than the queue holds: each is drawn or refused."""
        pictures = self._random.choice(self._catalogue)[:1]
        await asyncio.gather(*(self._send(_body(pictures), pictures) for _ in range(FLOOD)))

    async def send_garbage(self) -> None:
        """Bytes that are no request; whatever is answered, the connection has to end."""
        self.tally.sent += 1
        try:
            async with asyncio.timeout(HANG_S):
                reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
                writer.write(self._random.choice(_GARBAGE))
                writer.write_eof()
                answer = await reader.read()
                writer.close()
        except TimeoutError:
            self._note_break("hang: garbage keeps its connection")
        except ConnectionError:
            self.tally.answers["garbage, reset"] += 1
        else:
            status = answer[9:12].decode("ascii", "replace") or "closed"
            if status.startswith(("2", "5")):
                self._note_break(f"garbage was answered with {status}")
            else:
                self.tally.answers[f"garbage, {status}"] += 1

    async def _send(self, body: dict[str, Any], pictures: Sequence[Picture]) -> None:
        self.tally.sent += 1
        start = time.monotonic()
        try:
            async with asyncio.timeout(HANG_S):
                response = await self._http.post(_ROUTE, json=body)
        except (TimeoutError, httpx.TimeoutException):
            self._note_break("hang: no answer within the timeout")
            return
        except httpx.HTTPError as error:
            self._note_break(f"{type(error).__name__}: {error}")
            return
        if response.status_code == 429:
            self.tally.answers["429 queue full"] += 1
            return
        if response.status_code != 200:
            self._note_break(f"{response.status_code}: {response.text[:300]}")
            return
        items = _streamed(response.text) if body.get("stream") else _listed(response.json())
        if isinstance(items, str):
            self._note_break(f"in a stream: {items}")
            return
        if sorted(items) != list(range(len(pictures))):
            self._note_break(f"asked for {len(pictures)} images, got numbers {sorted(items)}")
            return
        self.tally.answers["images, streamed" if body.get("stream") else "images"] += 1
        self.tally.latencies_s.append(time.monotonic() - start)
        for number, picture in enumerate(pictures):
            png = base64.b64decode(items[number])
            distance = await asyncio.to_thread(self._gallery.distance, picture, png)
            self.tally.distances[distance] += 1
            if distance > TOLERANCE:
                self.tally.broken.append(f"wrong image, off by {distance}: {picture}")

    def _note_break(self, text: str) -> None:
        self.tally.answers[f"broken: {text.partition(':')[0]}"] += 1
        self.tally.broken.append(text)


def _body(pictures: Sequence[Picture]) -> dict[str, Any]:
    first = pictures[0]
    return {
        "prompt": first.prompt,
        "size": first.size,
        "seed": first.seed,
        "num_inference_steps": first.num_steps,
        "n": len(pictures),
    }


def _listed(answer: dict[str, Any]) -> dict[int, str]:
    return {number: item["b64_json"] for number, item in enumerate(answer["data"])}


def _streamed(text: str) -> dict[int, str] | str:
    """Finished images by number, or the error that the stream ended with; an image that comes twice is an error."""
    images: dict[int, str] = {}
    for block in text.split("\n\n"):
        name, _, data = block.partition("\n")
        if name == "event: error":
            return data[:300]
        if name == "event: image_generation.completed":
            event = json.loads(data.removeprefix("data: "))
            if event["image_index"] in images:
                return f"image {event['image_index']} came twice"
            images[event["image_index"]] = event["b64_json"]
    return images
