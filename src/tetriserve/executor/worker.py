"""One rank's present process, as seen from outside."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from tetriserve.config import PoolConfig
from tetriserve.core.memory import RankMemory
from tetriserve.executor.inbox import Inbox
from tetriserve.executor.outbox import Outbox
from tetriserve.executor.processes import kill_process

_LOADING_PATIENCE = 5.0
"""Loading may hold up heartbeats for so many times as long as serving may."""


@dataclass
class Worker:
    """Times are those of the host's monotonic clock.

    memory: what it holds, once it is ready.
    verdict: why it was killed, if we killed it.
    """

    process: BaseProcess
    connection: Connection
    lifeline: Connection
    inbox: Inbox
    outbox: Outbox
    born_s: float
    last_sign_s: float
    num_steps: int = 0
    last_step_s: float = 0.0
    is_ready: bool = False
    memory: RankMemory = RankMemory()
    verdict: str | None = None

    def kill(self, reason: str) -> None:
        """End it if it was not ended before; its lifeline then reports the loss."""
        if self.verdict is None:
            self.verdict = reason
            kill_process(self.process)

    def unwatch(self) -> None:
        self.outbox.close()
        for connection in (self.connection, self.lifeline):
            asyncio.get_running_loop().remove_reader(connection.fileno())
            connection.close()

    def shift(self, away_s: float) -> None:
        """Do not hold against it what it did not say while nobody listened."""
        self.born_s += away_s
        self.last_sign_s += away_s
        self.last_step_s += away_s

    def complaint(self, pool: PoolConfig, now: float, *, is_busy: bool) -> str | None:
        """Why it is taken for hung; None if it is not."""
        silence_s = self._silence_s(pool)
        if not self.is_ready and now - self.born_s > pool.start_timeout_s:
            return f"not ready within {pool.start_timeout_s:g} s"
        if now - self.last_sign_s > silence_s:
            return f"no sign of life for {silence_s:g} s"
        if is_busy and now - self.last_step_s > pool.step_timeout_s:
            return f"no progress for {pool.step_timeout_s:g} s"
        return None

    def _silence_s(self, pool: PoolConfig) -> float:
        """How long it may say nothing. One that has yet to load its libraries says nothing at all."""
        if self.is_ready:
            return pool.heartbeat_timeout_s
        has_begun = self.last_sign_s > self.born_s
        return _LOADING_PATIENCE * pool.heartbeat_timeout_s if has_begun else pool.start_timeout_s
