"""A real server on a real port, in this process."""

from __future__ import annotations

import asyncio
import signal

from fake_engine import CARD, make_engine

from tests.waiting import HANG_S, until
from tetriserve.config import AccessConfig, ServerConfig
from tetriserve.engine import Jobs
from tetriserve.server import serve

__all__ = ["Live", "until"]


class Live:
    """A server in this process. `stop` sends it SIGTERM and gives its exit code.

    access: settings of `AccessConfig`.
    """

    def __init__(self, executor, *, max_queue=64, cards=(CARD,), may_launch=None, shutdown_timeout_s=HANG_S, **access):
        self.engine = None
        self.url = asyncio.get_running_loop().create_future()

        async def launch():
            if may_launch is not None:
                await may_launch.wait()
            self.engine = make_engine(executor, max_queue=max_queue, cards=cards)
            return Jobs(self.engine)

        config = ServerConfig(port=0, shutdown_timeout_s=shutdown_timeout_s, access=AccessConfig(**access))
        self.serving = asyncio.create_task(serve(config, launch, on_ready=lambda url, engine: self.url.set_result(url)))

    async def end(self):
        """Stop it if it still runs, in a test that failed halfway. Its signal handlers would outlive it."""
        self.serving.cancel()
        await asyncio.gather(self.serving, return_exceptions=True)

    async def stop(self):
        if not self.serving.done():
            signal.raise_signal(signal.SIGTERM)
        return await self.serving
