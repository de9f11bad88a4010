"""How many bytes of bodies are in memory: of one, and of all together."""

from __future__ import annotations

from starlette.exceptions import HTTPException

EDITS, CHAT, QUOTES = "/v1/images/edits", "/v1/chat/completions", "/v1/quotes"
VIDEOS, VIDEOS_SYNC = "/v1/videos", "/v1/videos/sync"
_WITH_PICTURES = frozenset({EDITS, CHAT, QUOTES, VIDEOS, VIDEOS_SYNC})
"""Addresses whose bodies may hold pictures."""

MAX_BODY_BYTES = 2**20
MAX_PICTURES_BODY_BYTES = 2**25
"""Where a body may hold pictures: a photograph of 16 megapixels is a jpeg of about 10 MB, or 13 MB of base64."""
MAX_UPLOAD_BYTES = 2**28
"""Of all such bodies that are larger than others may be, until they have been decoded."""
_RETRY_S = "1"


class Uploads:
    """The large bodies of one app."""

    def __init__(self, max_bytes: int = MAX_UPLOAD_BYTES) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    def open(self, path: str) -> Upload:
        """The body of a request to `path`, before its first byte."""
        return Upload(self, MAX_PICTURES_BODY_BYTES if path in _WITH_PICTURES else MAX_BODY_BYTES)

    def take(self, num_bytes: int) -> bool:
        """Whether there is room for so many more; if so, they count from now on."""
        if self.num_bytes + num_bytes > self._max_bytes:
            return False
        self.num_bytes += num_bytes
        return True


class Upload:
    """One body as it comes. Whoever opened it calls `release`."""

    def __init__(self, uploads: Uploads, max_bytes: int) -> None:
        self._uploads = uploads
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._num_taken = 0

    def grow(self, num_bytes: int) -> None:
        """Note so many more bytes.

        Raises:
            HTTPException: 413, the body is too large; or 429, too many large ones are there.
        """
        self._num_bytes += num_bytes
        if self._num_bytes > self._max_bytes:
            raise HTTPException(413, f"the body is larger than {self._max_bytes} bytes")
        if self._num_bytes <= MAX_BODY_BYTES:
            return
        more = self._num_bytes - self._num_taken
        if not self._uploads.take(more):
            message = "too many large bodies are being received; send this one again"
            raise HTTPException(429, message, {"Retry-After": _RETRY_S})
        self._num_taken += more

    def release(self) -> None:
        """The body is not in memory any more. May be called again."""
        self._uploads.num_bytes -= self._num_taken
        self._num_taken = 0
