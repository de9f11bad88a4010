"""The seam between scheduling and everything else."""

from __future__ import annotations

from typing import Protocol

from tetriserve.core.plan import Plan, State


class Policy(Protocol):
    """Decides what starts now.

    The controller asks at every event (submission, task end, worker lost or joined, timer) and starts what it is told.
    Only tasks that were lost with their workers start without being asked for, and before it asks.
    Nothing is remembered between calls: equal arguments give equal plans, so a recorded run can be replayed.
    """

    def plan(self, state: State, now: float) -> Plan:
        """Tasks to start at `now` (seconds since the engine started), and when to ask again at the latest.

        Each task uses ranks from `state.idle_ranks` only, for a trajectory in `state.waiting`, at most one task per
        request; a task of a stage with steps runs between 1 and the remaining number of steps.
        """
        ...
