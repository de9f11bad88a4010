"""The page and its parts, as they are shipped in the package. They hold no secrets: everyone may read them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_PAGE = "page.html"

HEADERS = {
    # Nothing from elsewhere, nothing inline, in nobody's frame.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class Asset:
    content: bytes
    media_type: str


def _read_assets() -> dict[str, Asset]:
    assets = {}
    for file in files("tetriserve.server.board").joinpath("static").iterdir():
        suffix = file.name[file.name.rfind(".") :]
        path = "/" if file.name == _PAGE else f"/board/{file.name}"
        assets[path] = Asset(file.read_bytes(), _MEDIA_TYPES[suffix])
    return assets


ASSETS = _read_assets()
"""By path; some tens of kilobytes in all."""

OPEN_PATHS = frozenset(ASSETS)
