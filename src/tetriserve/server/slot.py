"""Where the app finds its engine."""

from __future__ import annotations

from collections.abc import Callable

from tetriserve.core.errors import TetriServeError
from tetriserve.engine import Jobs, LiveEngine

_STARTING = "starting: loading the model"


class NotReady(TetriServeError):
    """The engine is not there yet."""


class EngineSlot:
    """Empty while the model loads: the app listens, answers probes and refuses work politely until `put` fills it.

    jobs: those above the engine, in memory where `put` is given none; None while it is empty.
    """

    def __init__(self, engine: LiveEngine | None = None, jobs: Jobs | None = None) -> None:
        self.engine = engine
        self.jobs = jobs if engine is None else jobs or Jobs(engine)
        self._when_filled: list[Callable[[LiveEngine], None]] = []

    def put(self, engine: LiveEngine, jobs: Jobs | None = None) -> None:
        assert self.engine is None, "an app serves one engine in its life"
        self.engine, self.jobs = engine, jobs or Jobs(engine)
        for callback in self._when_filled:
            callback(engine)

    def when_filled(self, callback: Callable[[LiveEngine], None]) -> None:
        """Call back with the engine: now if it is there, else once it is."""
        if self.engine is not None:
            callback(self.engine)
        else:
            self._when_filled.append(callback)

    def require(self) -> LiveEngine:
        """The engine.

        Raises:
            NotReady: it is still starting.
        """
        if self.engine is None:
            raise NotReady(_STARTING)
        return self.engine

    def require_jobs(self) -> Jobs:
        """The jobs above the engine.

        Raises:
            NotReady: it is still starting.
        """
        if self.jobs is None:
            raise NotReady(_STARTING)
        return self.jobs

    @property
    def unready_reason(self) -> str | None:
        """Why a request sent now would not be served; None if it would be."""
        if self.engine is None:
            return _STARTING
        if self.engine.is_ready:
            return None
        if self.engine.failure is not None:
            return self.engine.failure
        return "shutting down" if self.engine.state.ranks else "no rank is up"
