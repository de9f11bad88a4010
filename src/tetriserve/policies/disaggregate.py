"""Ranks set aside for the short stages, so that steps neither wait for them nor are waited for (GF-DiT)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tetriserve.core.cluster import StageRanks
from tetriserve.core.cost import stages_gpu_s, times_per_step
from tetriserve.core.plan import Plan, State
from tetriserve.core.request import Request
from tetriserve.policies.nodes import within_nodes
from tetriserve.policies.policy import Policy

Ranks = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Disaggregate:
    """`disaggregate`: another policy, for which encode and decode have ranks of their own and steps have the others.

    num_aside: ranks for short stages, of the whole pool. None: as many as their part of the GPU time of all unfinished
        requests, done work included, so that the number changes with the mix and not with every task.

    At least one rank is set aside, and as many are left, on one node, as the narrowest degree of every unfinished
    request takes; a pool too small for both has none set aside. Where models have ranks of their own each of these sets
    is divided.
    """

    inner: Policy
    num_aside: int | None = None

    def plan(self, state: State, now: float) -> Plan:
        if not state.waiting or not state.idle_ranks:
            return Plan()
        state = replace(state, stage_ranks=divided(state, self.num_aside))
        return within_nodes(self.inner.plan(state, now), state, now)


def divided(state: State, num_aside: int | None) -> StageRanks:
    """Which ranks may run which stages, within what the pool allows; see `Disaggregate`."""
    kinds: dict[tuple[object, ...], list[Request]] = {}
    for trajectory in state.trajectories:
        request = trajectory.request
        kinds.setdefault((*request.kind, request.num_steps), []).append(request)
    groups: dict[Ranks, list[tuple[Request, int]]] = {}
    for first, *others in kinds.values():
        groups.setdefault(_allowed(first, first.stepped.kind, state), []).append((first, 1 + len(others)))
    limits: dict[tuple[str, str], Iterable[int]] = {}
    for ranks, members in groups.items():
        aside = _set_aside(ranks, members, state, num_aside)
        for request, _ in members:
            for stage in request.stages:
                allowed = _allowed(request, stage.kind, state)
                own = [rank for rank in allowed if (rank in aside) != bool(stage.num_steps)]
                limits[request.model, stage.kind] = own or allowed
    return StageRanks.of(limits)


def _set_aside(
    ranks: Ranks, members: Sequence[tuple[Request, int]], state: State, num_aside: int | None
) -> frozenset[int]:
    """Of `ranks`, which may run the steps of these requests: those that may run most of their short stages, lowest
    first; none where others run all of them."""
    uses: dict[int, int] = dict.fromkeys(ranks, 0)
    for request, _ in members:
        for stage in request.stages:
            for rank in _allowed(request, stage.kind, state) if not stage.num_steps else ():
                uses[rank] = uses.get(rank, 0) + 1
    shared = sorted((rank for rank in ranks if uses[rank]), key=lambda rank: (-uses[rank], rank))
    part = _short_part(members, state) if num_aside is None else num_aside / max(1, len(state.ranks))
    narrowest = max(min(times_per_step(state.cost, request)) for request, _ in members)
    count = max(0, min(max(1, round(part * len(ranks))), len(ranks) - narrowest))
    while count and state.nodes.most([rank for rank in ranks if rank not in shared[:count]]) < narrowest:
        count -= 1
    return frozenset(shared[:count])


def _short_part(members: Sequence[tuple[Request, int]], state: State) -> float:
    """The part of short stages in the GPU time of requests, each kind with its number, at their cheapest degrees."""
    short_s = total_s = 0.0
    for request, count in members:
        short = [stage for stage in request.stages if not stage.num_steps]
        short_s += count * stages_gpu_s(state.cost, request, short)
        total_s += count * stages_gpu_s(state.cost, request, request.stages)
    return short_s / total_s


def _allowed(request: Request, kind: str, state: State) -> Ranks:
    return state.stage_ranks.among(request.model, kind, state.ranks)
