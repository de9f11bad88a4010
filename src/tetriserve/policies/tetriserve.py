"""The round-based, deadline-aware scheduler of TetriServe (section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from operator import attrgetter

from tetriserve.core.plan import Plan, State, Task
from tetriserve.core.trajectory import Stage
from tetriserve.policies.packing import Group, Option, pack_round
from tetriserve.policies.placement import place
from tetriserve.policies.rounds import Round, RoundClock
from tetriserve.policies.scale_up import Choice, scale_up
from tetriserve.policies.stages import place_short_stages, short_stage_s
from tetriserve.policies.triage import Candidate, Triage, triage

MIN_ROUND_S = 0.05
"""Shorter rounds, which a very small model would get, spend their time on dispatch."""


class TetriServe:
    """Rounds on a fixed grid, in which as many requests as possible keep their deadlines.

    A round spans `step_granularity` steps of a reference shape. At every event the round's algorithm runs for the ranks
    that are idle, with the next boundary as horizon: at a boundary this is the paper's round, in between it fills what
    has become free. Denoise tasks end by the boundary, so that all ranks meet there and wide groups can form; that, not
    any memory between calls, is what reserves 8 ranks for a request that needs them.

    In order: encode and decode as soon as a rank is free; requests that can still meet their deadlines, packed by
    Algorithm 1, one priority class after the other; those that it deferred, at any degree that fits (`fill`); late
    requests, which cannot meet their deadlines any more, as narrow as possible; and wider degrees for all of these
    while ranks are left (`scale_up`).
    """

    def __init__(
        self,
        *,
        reference_step_s: float,
        switch_s: float,
        step_granularity: int = 5,
        placement: bool = True,
        scale_up: bool = True,
        fill: bool = True,
    ) -> None:
        """
        Args:
            reference_step_s: seconds per step of the reference shape: the largest, at its fastest degree.
            switch_s: seconds to start a task; part of the round, which would otherwise hold one step less.
            step_granularity: steps of the reference shape in a round.
            placement: keep requests on the ranks that hold their state.
            scale_up: widen tasks into ranks that would idle.
            fill: run requests that the packing deferred on ranks that would idle.
        """
        self.clock = RoundClock.of(max(MIN_ROUND_S, switch_s + step_granularity * reference_step_s))
        self.placement = placement
        self.scale_up = scale_up
        self.fill = fill

    def plan(self, state: State, now: float) -> Plan:
        """See `Policy.plan`. Asks again at the next boundary for as long as a request waits."""
        if not state.waiting:
            return Plan()
        this = self.clock.round_at(now)
        free = set(state.idle_ranks)
        if not free:
            return Plan(wake_at=this.end_s)
        waiting = triage(state, now, self.clock)
        tasks = place_short_stages(waiting.short, free, preserve=self.placement)

        if self._is_assembling(state, len(tasks), waiting, this, now):
            return Plan(tuple(tasks), wake_at=self.clock.grace_end_s(this))

        late_short = [
            trajectory
            for trajectory in waiting.late_short
            if self._may_start(now, short_stage_s(trajectory, state.cost), this)
        ]
        choices, spare = self._choose(waiting, len(free), len(late_short), this, now, state.cost.switch_s)
        wanted = [(choice.trajectory, choice.degree) for choice in choices]
        for choice, ranks in zip(choices, place(wanted, free, preserve=self.placement), strict=True):
            tasks.append(Task(choice.trajectory.request_id, Stage.DENOISE, ranks, choice.num_steps))
            free.difference_update(ranks)
        tasks += place_short_stages(late_short, free, preserve=self.placement)
        return Plan(tuple(tasks), wake_at=this.end_s)
