"""Instances small enough for exact search (TetriServe, table 6)."""

from __future__ import annotations

from dataclasses import replace

from tetriserve.core.plan import State
from tetriserve.core.trajectory import Trajectory
from tetriserve.simulator.scenario import Scenario, prepare


def instance_at_once(num_ranks: int, num_requests: int, *, scenario: Scenario, seed: int = 0) -> State:
    """The first `num_requests` of a scenario's workload as if all arrived at time 0, on `num_ranks` idle ranks.

    What `Exhaustive.search(state, 0.0)` takes: how long it does and `num_nodes` are the figures of table 6.

    Raises:
        ConfigError: the scenario cannot be used.
    """
    setting = prepare(replace(scenario, num_ranks=num_ranks, num_requests=num_requests))
    requests = (
        replace(request, arrival_s=0.0, deadline_s=request.deadline_s - request.arrival_s)
        for request in setting.requests(seed)
    )
    return State(
        trajectories=tuple(Trajectory(request) for request in requests),
        in_flight=(),
        ranks=tuple(range(num_ranks)),
        cost=setting.cost,
        stage_ranks=setting.stage_ranks,
        nodes=setting.nodes,
    )
