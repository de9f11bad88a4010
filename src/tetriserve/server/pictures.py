"""Pictures as clients send them: files of three formats, and data URLs. Their bytes are in no message and no log."""

from __future__ import annotations

import binascii
import io
import re
from collections.abc import Sequence

from PIL import Image

from tetriserve.core.errors import InvalidRequest
from tetriserve.engine.pictures import InputPicture

FORMATS = ("png", "jpeg", "webp")
MAX_PIXELS = 2**24
"""Of one picture: 4096x4096. They are in memory at 3 bytes each until the request is over."""

_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_SLICE = 2**20
"""Characters of base64, of which four stand for three bytes: other threads run in between."""


def decode_all(files: Sequence[bytes], param: str) -> list[InputPicture]:
    """Takes a second for many pixels: call it off the event loop. `param` is what the client calls them.

    Raises:
        InvalidRequest: one cannot be decoded, or is too large.
    """
    names = [param] if len(files) == 1 else [f"{param} {number} of {len(files)}" for number in range(1, 1 + len(files))]
    return [_decode(file, name, param) for file, name in zip(files, names, strict=True)]


def files_of(urls: Sequence[str], param: str) -> list[bytes]:
    """What data URLs hold. Call it off the event loop.

    Raises:
        InvalidRequest: one is no data URL.
    """
    return [_file_of(url, param) for url in urls]


def _decode(file: bytes, name: str, param: str) -> InputPicture:
    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as image:  # reads no further than the size
            width, height = image.size
            if width * height <= MAX_PIXELS:
                image.load()
                return InputPicture.of_image(image)
    except Image.DecompressionBombError:
        raise InvalidRequest(f"{name} is far too large; allowed: at most {MAX_PIXELS} pixels", param) from None
    except Exception:  # Pillow raises of damaged files whatever its parsers run into; its texts may quote them
        raise InvalidRequest(f"{name} is no whole {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file", param) from None
    raise InvalidRequest(f"{name} is {width}x{height}; allowed: at most {MAX_PIXELS} pixels", param)


def _file_of(url: str, param: str) -> bytes:
    head = _DATA_URL.match(url)
    if head is None:
        what = (
            "an address, and nothing is fetched" if url[:8].lower().startswith(("http:", "https:")) else "no data URL"
        )
        allowed = "allowed: a file in multipart/form-data, or data:image/png;base64,..."
        raise InvalidRequest(f"{param} is {what}; {allowed}", param)
    try:
        starts = range(head.end(), len(url), _SLICE)
        return b"".join(binascii.a2b_base64(url[start : start + _SLICE], strict_mode=True) for start in starts)
    except ValueError:
        raise InvalidRequest(f"{param} is a data URL whose base64 cannot be decoded", param) from None
