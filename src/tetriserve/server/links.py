"""Files that are served for a while under names that cannot be guessed: images of `response_format: url`."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response

from tetriserve.core.errors import InvalidRequest
from tetriserve.server.errors import envelope
from tetriserve.server.schemas import ErrorEnvelope

PREFIX = "/v1/images/links/"
MAX_BYTES = 2**28
"""Of all files: some 100 images of 1024x1024. Beyond, the oldest are given up before their time."""

_NAME_BYTES = 24
"""192 bits of chance."""


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str
    end: float


class Links:
    """Files by name, for `ttl_s` seconds each, of `max_bytes` together at most. Lives on one event loop."""

    def __init__(self, ttl_s: float, max_bytes: int = MAX_BYTES) -> None:
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None
        self.num_bytes = 0

    @property
    def ttl_s(self) -> float:
        return self._ttl_s

    def check_served(self) -> None:
        """
        Raises:
            InvalidRequest: the operator wants no links.
        """
        if self._ttl_s == 0:
            raise InvalidRequest(
                "response_format is 'url', and this server keeps no images; served: 'b64_json'", "response_format"
            )

    def put(self, content: bytes, media_type: str) -> str:
        """Keep a file, such as one of `image/png`; its path, to be put behind the server's address."""
        name = f"{secrets.token_urlsafe(_NAME_BYTES)}.{media_type.rpartition('/')[2]}"
        self._files[name] = _File(content, media_type, asyncio.get_running_loop().time() + self._ttl_s)
        self.num_bytes += len(content)
        while self.num_bytes > self._max_bytes and len(self._files) > 1:
            self._drop_oldest()
        self._expire()
        return PREFIX + name

    def get(self, name: str) -> tuple[bytes, str, float] | None:
        """Content, media type, and for how many seconds more; None if there is no such file, or none any more."""
        self._expire()
        file = self._files.get(name)
        return None if file is None else (file.content, file.media_type, file.end - asyncio.get_running_loop().time())

    def _expire(self) -> None:
        """Drop what is over, and see that what is over next will be dropped though nobody asks."""
        loop = asyncio.get_running_loop()
        while self._files and next(iter(self._files.values())).end <= loop.time():
            self._drop_oldest()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._files:
            self._timer = loop.call_at(next(iter(self._files.values())).end, self._expire)

    def _drop_oldest(self) -> None:
        _, file = self._files.popitem(last=False)
        self.num_bytes -= len(file.content)


def links_router(links: Links) -> APIRouter:
    router = APIRouter()

    @router.get(
        PREFIX + "{name}",
        response_class=Response,
        responses={
            200: {
                "description": "The file.",
                "content": {
                    f"image/{kind}": {"schema": {"type": "string", "format": "binary"}}
                    for kind in ("png", "jpeg", "webp")
                },
            },
            404: {"model": ErrorEnvelope, "description": "There is no such image, or none any more."},
        },
    )
    async def get_image(request: Request, name: str) -> Response:
        """An image that was asked for with `response_format: url`. Its name is the permission: no key is needed."""
        found = links.get(name)
        if found is None:
            message = f"there is no such image; images are kept for {links.ttl_s:g} s, fewer if many are asked for"
            response = envelope(404, message, "not_found")
            request.state.exchange.note_error(response)
            return response
        content, media_type, left_s = found
        headers = {"Cache-Control": f"private, max-age={int(left_s)}", "X-Content-Type-Options": "nosniff"}
        return Response(content, headers=headers, media_type=media_type)

    return router


def shown_path(path: str) -> str:
    """`path` for the log: whoever knows the name of a link may fetch it."""
    return PREFIX + "..." if path.startswith(PREFIX) else path
