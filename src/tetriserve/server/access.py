"""Who may use the server: API keys, each with limits of its own."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tetriserve.config import AccessConfig
from tetriserve.server import links
from tetriserve.server.board.pages import OPEN_PATHS
from tetriserve.server.errors import envelope
from tetriserve.server.exchange import Exchange
from tetriserve.server.limits import Allowance

PROBES = frozenset({"/health", "/ready", "/openapi.json"})
"""Open to everyone: whoever restarts and balances servers has no key, and these say nothing of requests."""


@dataclass(frozen=True)
class Caller:
    """Whoever uses one API key; all together where there are none. `number` is 1 for the first key of the config."""

    number: int
    digest: bytes = field(repr=False)
    allowance: Allowance

    @property
    def tenant(self) -> str:
        """Names the client in the journal: the same as long as its key is, in whatever order keys are configured."""
        return hashlib.sha256(self.digest).hexdigest()[:16]


class AccessMiddleware:
    """Lets through whoever shows a key, before a byte of the body is read. With no key configured: everyone.

    Everything is guarded unless it is listed as open, so that a new route is never open by accident; a link is guarded
    by its name, which only the client who asked for the image was told. The handler finds
    the client as `request.state.client`.

    is_local: the server listens on loopback. Without keys it then answers to names of loopback alone: a page of another
        site, whose name was made to lead here (DNS rebinding), is told by the name that it calls.
    """

    def __init__(self, app: ASGIApp, config: AccessConfig, *, is_local: bool = False) -> None:
        self._app = app
        self._needs_local_name = is_local and not config.api_keys
        self._open = PROBES | OPEN_PATHS | (frozenset() if config.guard_metrics else {"/metrics"})
        self._has_keys = bool(config.api_keys)
        self._clients = [
            Caller(number, _digest(key.encode()), Allowance(config.rate_limit, config.max_concurrency))
            for number, key in enumerate(config.api_keys or ("",), start=1)
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange: Exchange = scope["state"]["exchange"]
        if self._needs_local_name and not is_local_name(Headers(scope=scope).get("host", "localhost")):
            message = "this server is for its own machine: call it by localhost or 127.0.0.1, or set an API key"
            response = envelope(421, message, "host_not_served")
            exchange.note_error(response)
            await response(scope, receive, send)
            return
        if scope["path"] in self._open or scope["path"].startswith(links.PREFIX):
            await self._app(scope, receive, send)
            return
        client = self._identify(scope) if self._has_keys else self._clients[0]
        if client is not None:
            scope["state"]["client"] = client
            if self._has_keys:
                exchange.facts["key"] = client.number
            await self._app(scope, receive, send)
            return
        if "authorization" in Headers(scope=scope):
            message = "this API key is not known here"
        else:
            message = "send an API key in the header Authorization: Bearer KEY"
        response = envelope(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        exchange.note_error(response)
        await response(scope, receive, send)

    def _identify(self, scope: Scope) -> Caller | None:
        """Who shows a key. Takes the same time whichever key fits, or none, and however much of it."""
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        shown = _digest(key.strip().encode("latin-1"))
        known = [client for client in self._clients if hmac.compare_digest(client.digest, shown)]
        return known[0] if known and scheme.lower() == "bearer" else None


def is_local_name(host: str) -> bool:
    """Whether a `Host` header, or an address, names this machine's loopback."""
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host
    if name.count(":") == 1:
        name = name.partition(":")[0]
    name = name.lower().removesuffix(".")
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _digest(key: bytes) -> bytes:
    """Digests have one length: comparing keys themselves would tell theirs."""
    return hashlib.sha256(key).digest()
