"""Where the server listens."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from tetriserve.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens; `path` is what stands before `/v1`."""

    host: str
    port: int
    path: str
    is_tls: bool

    @classmethod
    def parse(cls, base_url: str) -> Address:
        """Read `http://host:port`, with or without the `/v1` that OpenAI's clients want.

        Raises:
            ConfigError: not the URL of a server.
        """
        problem = ConfigError(f"base-url is {base_url!r}; write it as http://HOST:PORT or https://HOST")
        try:
            parts = urlsplit(base_url)
            port = parts.port
        except ValueError:
            raise problem from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise problem
        if not parts.netloc.isascii() or "@" in parts.netloc or not parts.path.isascii() or " " in base_url:
            raise problem
        is_tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if is_tls else 80), path, is_tls)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.is_tls else 'http'}://{host}:{self.port}{self.path}"
