"""What happens in an engine, as the page wants to hear it: everything at first, then what changed."""

from __future__ import annotations

from collections.abc import Callable

from tetriserve.core.events import Submitted
from tetriserve.engine import EndedTask, LiveEngine, Observation, Occurred
from tetriserve.server.board.rows import (
    Row,
    ended_row,
    model_row,
    open_row,
    ran_rows,
    request_row,
    running_rows,
    seconds,
)
from tetriserve.server.recent import KEEP_S, RecentRuns
from tetriserve.server.slot import EngineSlot
from tetriserve.workload.outcome import Outcome

BLOCKS_S = 120.0
"""How far back tasks are told to a page that opens."""
OUTCOMES_S = KEEP_S
"""How far back ended requests are."""


class BoardFeed:
    """Collects changes of the slot's engine while `is_watched`; calls `on_change` at each, before it is handled."""

    def __init__(self, slot: EngineSlot, recent: RecentRuns, on_change: Callable[[], None]) -> None:
        self.is_watched = False
        self._plan: Row | None = None
        self._slot = slot
        self._recent = recent
        self._on_change = on_change
        self._arrived: list[Row] = []
        self._ran: list[Row] = []
        self._ended: list[Row] = []
        self._has_plan_changed = False
        slot.when_filled(self._attach)

    def snapshot(self) -> Callable[[], Row]:
        """All that a page needs to begin with; the result makes it up, which takes long enough for a thread."""
        excerpt = self._recent.last(OUTCOMES_S)
        engine, plan, status = self._slot.require(), self._plan, self._slot.unready_reason

        def make() -> Row:
            since = excerpt.now - BLOCKS_S
            state = excerpt.state
            return {
                "now_s": seconds(excerpt.now),
                "status": status,
                "models": [model_row(intake) for intake in engine.models.intakes],
                "policy": engine.policy_name,
                "ranks": state.ranks,
                "requests": [open_row(trajectory) for trajectory in state.trajectories],
                "running": [row for flight in state.in_flight for row in running_rows(flight)],
                "ran": [
                    row for ended in reversed(excerpt.tasks) if ended.run.end_s >= since for row in ran_rows(ended)
                ],
                "ended": [ended_row(outcome) for outcome in reversed(excerpt.outcomes)],
                "plan": plan,
            }

        return make

    def take_changes(self) -> Row:
        """What happened since the last call or since anyone watches. What runs, and on which ranks, is told whole."""
        engine = self._slot.require()
        state = engine.state
        changes: Row = {
            "now_s": seconds(engine.now),
            "status": self._slot.unready_reason,
            "ranks": state.ranks,
            "running": [row for flight in state.in_flight for row in running_rows(flight)],
        }
        lists = {"arrived": self._arrived, "ran": self._ran, "ended": self._ended}
        changes |= {name: rows for name, rows in lists.items() if rows}
        if self._has_plan_changed:
            changes["plan"] = self._plan
        self._forget_changes()
        return changes

    def change_plan(self, plan: Row) -> None:
        """Tell `plan` with the next changes."""
        self._plan, self._has_plan_changed = plan, True

    def rest(self) -> None:
        """Nobody watches any more."""
        self.is_watched, self._plan = False, None
        self._forget_changes()

    def _forget_changes(self) -> None:
        self._arrived, self._ran, self._ended = [], [], []
        self._has_plan_changed = False

    def _attach(self, engine: LiveEngine) -> None:
        engine.subscribe(self._observe)

    def _observe(self, observation: Observation) -> None:
        if not self.is_watched:
            return
        match observation:
            case Occurred(Submitted(request)):
                self._arrived.append(request_row(request))
            case EndedTask():
                self._ran += ran_rows(observation)
            case Outcome():
                self._ended.append(ended_row(observation))
        self._on_change()
