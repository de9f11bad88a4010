"""Short stages, which run outside of rounds and reservations, and how stages follow each other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from tetriserve.core.cluster import Role
from tetriserve.core.plan import State, Task
from tetriserve.core.request import Request
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.degrees import EfficientDegree, efficient_degrees
from tetriserve.policies.room import Room
from tetriserve.policies.timeline import EPSILON_S


def urgency_order(trajectory: Trajectory) -> tuple[int, float, float, str]:
    """Sort key: priority class, then deadline; arrival and id make it total."""
    request = trajectory.request
    return request.priority, request.deadline_s, request.arrival_s, request.request_id


Paces = tuple[EfficientDegree, ...]
"""How short stages may be run: degrees that are worth it, cheapest and slowest first, in seconds with the time to start
each task."""


@lru_cache(maxsize=1024)
def paces_of(times: tuple[tuple[int, float], ...], num_ranks: int, switch_s: float) -> Paces:
    """Of one short stage, at degrees of at most `num_ranks`; at its narrowest where none is that narrow."""
    fitting = {degree: switch_s + seconds for degree, seconds in times if degree <= num_ranks}
    return efficient_degrees(fitting or {degree: switch_s + seconds for degree, seconds in times[:1]})


def one_after_another(parts: Sequence[Paces]) -> Paces:
    """Of several short stages together, each at its fastest within the same number of ranks."""
    if len(parts) < 2:
        return parts[0] if parts else ()
    found: list[EfficientDegree] = []
    for most in sorted({degree for paces in parts for degree, _, _ in paces}):
        chosen = [within(paces, most) for paces in parts]
        found.append((most, sum([pace[1] for pace in chosen]), sum([pace[2] for pace in chosen])))
    return tuple(found)


def within(paces: Paces, num_ranks: int) -> EfficientDegree:
    """The fastest of `paces` on so many ranks; the cheapest if none is that narrow."""
    return next((pace for pace in reversed(paces) if pace[0] <= num_ranks), paces[0])


def in_time(paces: Paces, budget_s: float, num_ranks: int) -> EfficientDegree:
    """The cheapest of `paces` on so many ranks that takes at most `budget_s`; if there is none, see `within`."""
    fitting = (pace for pace in paces if pace[0] <= num_ranks and pace[1] <= budget_s + EPSILON_S)
    return next(fitting, None) or within(paces, num_ranks)


class Ahead(NamedTuple):
    """What lies ahead of a request at one of its stages.

    short: the present stage; nothing where it has steps.
    before: short stages up to the next one with steps, the present one included.
    has_steps: whether there is one with steps.
    after: what comes after that one.
    rest_s, rest_gpu_s: seconds of `before` and `after` at their fastest, and rank-seconds at their cheapest.
    role, steps_role, after_role: of the present stage, of the one with steps and of what follows it: the ranks that
        may run it, None for every rank.
    """

    short: Paces
    before: Paces
    has_steps: bool
    after: Paces
    rest_s: float
    rest_gpu_s: float
    role: Role | None
    steps_role: Role | None
    after_role: Role | None

    @classmethod
    def of(
        cls,
        short: Paces,
        before: Paces,
        after: Paces,
        *,
        has_steps: bool,
        role: Role | None = None,
        steps_role: Role | None = None,
        after_role: Role | None = None,
    ) -> Ahead:
        rest = [paces for paces in (before, after) if paces]
        rest_s, rest_gpu_s = sum([paces[-1][1] for paces in rest]), sum([paces[0][2] for paces in rest])
        return cls(short, before, has_steps, after, rest_s, rest_gpu_s, role, steps_role, after_role)


def ahead_of(request: Request, state: State) -> tuple[Ahead, ...]:
    """One entry for each of the request's stages."""
    cost, stage_ranks = state.cost, state.stage_ranks
    paces = []
    for stage in request.stages:
        times = () if stage.num_steps else tuple(cost.times(request, stage).items())
        paces.append(paces_of(times, state.num_ranks_for(request, stage), cost.switch_s) if times else ())
    roles: tuple[Role | None, ...] = ()
    if stage_ranks:
        roles = tuple(stage_ranks.role(request.model, stage.kind) for stage in request.stages)
    return _ahead(tuple(paces), roles or (None,) * len(paces), request.kind)


@lru_cache(maxsize=1024)
def _ahead(stages: tuple[Paces, ...], roles: tuple[Role | None, ...], kind: tuple[object, ...]) -> tuple[Ahead, ...]:
    """`ahead_of` stages with these paces, none where a stage has steps, and roles.

    kind: of the requests. Policies tell kinds apart by the identity of what is returned, also where their times agree.
    """
    steps_at = stages.index(()) if () in stages else 0
    found = []
    for index, present in enumerate(stages):
        first = stages.index((), index) if () in stages[index:] else len(stages)
        found.append(
            Ahead.of(
                present,
                one_after_another([paces for paces in stages[index:first] if paces]),
                one_after_another([paces for paces in stages[first:] if paces]),
                has_steps=first < len(stages),
                role=roles[index],
                steps_role=roles[steps_at],
                after_role=roles[steps_at + 1] if steps_at + 1 < len(roles) else None,
            )
        )
    return tuple(found)


def place_short_stages(
    wanted: Sequence[tuple[Trajectory, int]], room: Room, *, team_s: float, preserve: bool = True
) -> list[Task]:
    """One task per trajectory and degree, on the ranks of `room` that were taken for it.

    They start as soon as ranks are free, never at a round's start: a short request would spend most of its deadline
    waiting for two rounds to end. They run where the state is when that rank is free. A rank runs one task, so
    that decodes are one at a time per worker, which bounds peak memory (TetriServe, section 5).
    """
    placed = room.place(wanted, team_s=team_s, preserve=preserve)
    return [
        Task((trajectory.request_id,), trajectory.stage.kind, ranks)
        for (trajectory, _), ranks in zip(wanted, placed, strict=True)
    ]
