"""What an engine tells those who observe it, as one stream, and a guard between them and the engine."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec

from tetriserve.core.events import Event
from tetriserve.engine.tasks import EndedTask
from tetriserve.workload.outcome import Outcome

logger = logging.getLogger(__name__)

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Occurred:
    """`event` reached the engine at `now` and is not handled yet: the engine's state is that of the event before."""

    event: Event
    now: float


@dataclass(frozen=True, slots=True)
class Stopped:
    """Every client has its answer. Nothing follows."""


Observation = Occurred | EndedTask | Outcome | Stopped
"""In order: an event, the task that it ends, the outcomes that it leads to; `Stopped` last."""

Observer = Callable[[Observation], None]
"""Called on the event loop. It should be quick: the pool waits."""


class Observers:
    """Tells each observation to all observers. One that raises disturbs neither the engine nor the others.

    num_errors: how often one raised.
    """

    def __init__(self) -> None:
        self.num_errors = 0
        self._observers: list[Observer] = []
        self._logged: set[tuple[str, int | None]] = set()

    def add(self, observer: Observer) -> None:
        self._observers.append(observer)

    def tell(self, observation: Observation) -> None:
        for observer in self._observers:
            self.call(observer, observation)

    def call(self, observer: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call `observer`; an error of it is counted, and logged the first time that it comes from its line."""
        try:
            observer(*args, **kwargs)
        except Exception as error:
            self.num_errors += 1
            frame = traceback.extract_tb(error.__traceback__)[-1]
            if (frame.filename, frame.lineno) not in self._logged:
                self._logged.add((frame.filename, frame.lineno))
                logger.exception("an observer of the engine failed; requests go on, and this line is logged once")
