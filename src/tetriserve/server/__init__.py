"""The HTTP side: OpenAI's images API, probes and metrics in front of one engine."""

from tetriserve.server.app import create_app
from tetriserve.server.run import run_server, serve
from tetriserve.server.slot import EngineSlot

__all__ = ["EngineSlot", "create_app", "run_server", "serve"]
