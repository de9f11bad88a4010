"""Files from disk as answers: a piece at a time, and from the middle where a player asks for that."""

from __future__ import annotations

import asyncio
import re
from typing import Any, BinaryIO

from fastapi import Response
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from tetriserve.engine.progress import StoredFile
from tetriserve.server.errors import envelope

_PIECE_BYTES = 2**18
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)

FILE_RESPONSES: dict[int | str, dict[str, Any]] = {
    206: {"description": "The part that the header Range asks for."},
    416: {"description": "The file has no such part."},
}
"""For `/openapi.json`, beside 200."""


class FileAnswer(Response):
    """The whole of an opened file, or the part that the header `Range` asks for. Where that names several parts, it is
    the whole. It closes the file.
    """

    def __init__(self, opened: BinaryIO, file: StoredFile, media_type: str, headers: dict[str, str]) -> None:
        self._opened = opened
        self._num_bytes = file.num_bytes
        self._tag = f'"{file.checksum}"'
        super().__init__(
            headers={
                "Accept-Ranges": "bytes",
                "ETag": self._tag,
                "X-Content-Type-Options": "nosniff",
                "Cache-Control": "private, no-cache",
                **headers,
            },
            media_type=media_type,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._opened:
            part = self._part(Headers(scope=scope))
            if part is None:
                message = f"the file has {self._num_bytes} bytes, and none of the range that is asked for"
                refused = envelope(
                    416, message, "invalid_range", headers={"Content-Range": f"bytes */{self._num_bytes}"}
                )
                scope["state"]["exchange"].note_error(refused)
                await refused(scope, receive, send)
                return
            if len(part) < self._num_bytes:
                self.status_code = 206
                self.headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{self._num_bytes}"
            self.headers["Content-Length"] = str(len(part))
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            self._opened.seek(part.start)
            num_left = len(part)
            while num_left:
                piece = await asyncio.to_thread(self._opened.read, min(num_left, _PIECE_BYTES))
                assert piece, "files of videos are never written to again"
                num_left -= len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": num_left > 0})

    def _part(self, headers: Headers) -> range | None:
        """The bytes to send; None if there are none of those that are asked for."""
        asked = _RANGE.fullmatch(headers.get("range", ""))
        if asked is None or asked[0] == "bytes=-" or headers.get("if-range", self._tag) != self._tag:
            return range(self._num_bytes)
        if asked[1] == "":
            part = range(max(0, self._num_bytes - int(asked[2])), self._num_bytes)
        else:
            stop = self._num_bytes if asked[2] == "" else min(int(asked[2]) + 1, self._num_bytes)
            if asked[2] and int(asked[2]) < int(asked[1]):
                return range(self._num_bytes)  # which is no range
            part = range(int(asked[1]), stop)
        return part or None
