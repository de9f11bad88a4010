"""`exhaustive`: the best schedule of the requests known now (TetriServe, table 6); for tiny instances."""

from __future__ import annotations

import logging

from tetriserve.core.plan import Plan, State, Task
from tetriserve.policies.exact import BestSchedule, find_best_schedule
from tetriserve.policies.room import Room

logger = logging.getLogger(__name__)

NUM_NODES = 100_000
"""Partial schedules that one search makes at most by default: some seconds."""


class Exhaustive:
    """Starts what the best schedule of the requests known now starts now, and searches again at every event.

    See `exact` for what best means, and for the schedules among which it is exact. A search that would make more than
    `max_nodes` partial schedules uses the best complete one that it knows, and a warning says so once. There always is
    one: requests by deadline, each at its fastest, or side by side.
    """

    def __init__(self, max_nodes: int = NUM_NODES) -> None:
        self.max_nodes = max_nodes
        self._has_warned = False

    def plan(self, state: State, now: float) -> Plan:
        if not state.waiting or not state.idle_ranks:
            return Plan()
        waiting = {trajectory.request_id: trajectory for trajectory in state.waiting}
        starts, room = [], Room.of(state)
        best = [start for start in self.search(state, now).starts if start.request_id in waiting]
        # Of tasks that end at one moment the controller hears one by one, so a start may have to wait for the next. So
        # may one for which the search took any rank to do. Those that go on where they are come first: nobody else
        # shall take their ranks.
        for start in sorted(best, key=lambda start: len(waiting[start.request_id].holders) != start.degree):
            if room.take(waiting[start.request_id], start.degree):
                starts.append(start)
        placed = room.place([(waiting[start.request_id], start.degree) for start in starts], team_s=state.cost.team_s)
        return Plan(
            tuple(
                Task((start.request_id,), waiting[start.request_id].stage.kind, ranks, start.num_steps)
                for start, ranks in zip(starts, placed, strict=True)
            )
        )

    def search(self, state: State, now: float) -> BestSchedule:
        """The schedule that `plan` follows, of everything unfinished in `state` from `now` on."""
        best = find_best_schedule(state, now, max_nodes=self.max_nodes)
        if not best.is_exact and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "exhaustive stopped a search after %d partial schedules: a better schedule may exist; "
                "exhaustive:nodes=N searches longer",
                self.max_nodes,
            )
        return best
