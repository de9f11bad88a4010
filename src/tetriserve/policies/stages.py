"""Encode and decode: short stages on one rank, outside the rounds."""

from __future__ import annotations

from collections.abc import Sequence

from tetriserve.core.plan import Task
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.placement import FreeRanks


def urgency_order(trajectory: Trajectory) -> tuple[int, float, float, str]:
    """Sort key: priority class, then deadline; arrival and id make it total."""
    request = trajectory.request
    return request.priority, request.deadline_s, request.arrival_s, request.request_id


def place_short_stages(trajectories: Sequence[Trajectory], free: set[int], *, preserve: bool = True) -> list[Task]:
    """One task per trajectory, in the order given, for as long as ranks are free; takes them out of `free`.

    They start as soon as a rank is free, never at a round's start: a short request would spend most of its deadline
    waiting for two rounds to end. Decode runs where the latents are when that rank is free. One rank runs one task, so
    that decodes are one at a time per worker, which bounds peak memory (TetriServe, section 5).
    """
    if not trajectories:
        return []
    tasks = []
    available = FreeRanks(free)
    for trajectory in trajectories:
        if not free:
            break
        ranks = available.take(1, trajectory.holders if preserve else ())
        free.difference_update(ranks)
        tasks.append(Task(trajectory.request_id, trajectory.stage, ranks))
    return tasks
