"""Simulated pools of which only some ranks encode: outcomes, forecasts, the bound, and the planner."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tetriserve.control import Controller
from tetriserve.control.admission import backlog_s, earliest_finish
from tetriserve.control.whatif import forecast
from tetriserve.core.cluster import StageRanks
from tetriserve.core.errors import ConfigError
from tetriserve.core.events import Submitted, WorkerJoined
from tetriserve.core.plan import Plan, State, Task
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies import make_policy
from tetriserve.simulator.bound import max_attained
from tetriserve.simulator.planner import find_smallest_pool
from tetriserve.simulator.run import simulate
from tetriserve.simulator.scenario import Scenario, prepare
from tetriserve.workload.outcome import Status

POLICIES = [*prepare(Scenario()).policies("all"), "unsteady"]
ONE_ENCODES = StageRanks.of({("", ENCODE): [0]})
SET_ASIDE = StageRanks.of({("", ENCODE): [0], ("", DECODE): [0, 1], ("", DENOISE): range(2, 8)})


class Unaware:
    """Each request on the first idle rank, whatever its stage may run on."""

    def plan(self, state: State, now: float) -> Plan:
        pairs = zip(state.waiting, state.idle_ranks, strict=False)
        return Plan(
            tuple(
                Task((one.request_id,), one.stage.kind, (rank,), min(one.remaining_steps, 3) * (not one.is_short))
                for one, rank in pairs
            )
        )


@pytest.mark.parametrize("limits", [ONE_ENCODES, SET_ASIDE], ids=["encode", "set aside"])
@pytest.mark.parametrize("spec", [*POLICIES, "unaware"])
def test_under_every_policy_all_requests_finish_on_ranks_that_may_run_them(spec, limits, flux, workload):
    requests = workload(count=25, rate=30)
    shapes = flux.profile.shapes
    policy = Unaware() if spec == "unaware" else make_policy(spec, flux, num_ranks=8, shapes=shapes)
    outcomes = list(simulate(policy, flux, requests, num_ranks=8, stage_ranks=limits))
    assert [outcome.status for outcome in outcomes] == [Status.FINISHED] * 25
    tasks = [run.task for outcome in outcomes for run in outcome.runs]
    assert all(limits.allows("", task.stage, task.ranks) for task in tasks)
    used = {rank for task in tasks for rank in task.ranks}
    assert used == set(range(8)) or spec in ("fixed:1", "fixed:2", "fixed:4", "fixed:8", "fcfs", "rssp", "unaware")
    attained = sum(outcome.is_attained for outcome in outcomes)
    assert attained <= max_attained(requests, flux, 8)


def test_the_bound_without_limits_is_one_with_them_where_encoding_is_what_limits(table_cost, request_of):
    """Four requests of one second each on four ranks: with one rank that encodes half of them are in time."""
    cost = table_cost({256: {1: 0.5}}, encode=0.5)
    requests = [request_of(0.0, 1.5, name=f"r{n}") for n in range(4)]
    policy = make_policy("lookahead", cost, num_ranks=4, shapes=[requests[0].shape])
    found = [
        sum(outcome.is_attained for outcome in simulate(policy, cost, requests, num_ranks=4, stage_ranks=limits))
        for limits in (StageRanks(), ONE_ENCODES)
    ]
    assert found == [4, 2]
    assert max_attained(requests, cost, 4) == 4


@pytest.fixture
def encoding(flux, workload):
    """A controller with many requests that all wait to be encoded, by one rank or by all."""

    def build(limits: StageRanks, encode_s: float = 0.5) -> Controller:
        rows = tuple(replace(row, seconds=encode_s) if row.stage == ENCODE else row for row in flux.profile.rows)
        cost = replace(flux, profile=replace(flux.profile, rows=rows), _memo={}, _profiled={}, _known_cases={})
        policy = make_policy("lookahead", cost, num_ranks=8, shapes=cost.profile.shapes)
        controller = Controller(policy, cost, stage_ranks=limits)
        controller.handle_all([Submitted(replace(one, arrival_s=0.0)) for one in workload(count=40)], 0.0)
        controller.handle_all([WorkerJoined(rank) for rank in range(8)], 0.0)
        return controller

    return build


@pytest.mark.parametrize("resolution", [0.0, 0.3])
def test_forecasts_have_requests_wait_for_the_rank_that_encodes(encoding, resolution, flux):
    course = {}
    for limits in (StageRanks(), ONE_ENCODES):
        controller = encoding(limits)
        policy = make_policy("lookahead", controller.cost, num_ranks=8, shapes=flux.profile.shapes)
        found = forecast(controller, 0.0, policy, resolution=resolution)
        assert len(found.finish_s) == 40
        assert all(limits.allows("", run.task.stage, run.task.ranks) for run in found.runs)
        course[limits] = max(found.finish_s.values())
    assert course[ONE_ENCODES] > 40 * 0.5


def test_estimates_count_that_encodes_go_one_after_the_other(encoding, request_of):
    newcomer = replace(request_of(0.0, 1e6), stages=encoding(ONE_ENCODES).state.trajectories[0].request.stages)
    slow = [encoding(limits, encode_s=5.0).state for limits in (StageRanks(), ONE_ENCODES)]
    alike, limited = (earliest_finish(state, newcomer, 0.0) for state in slow)
    assert limited > 39 * 5.0 > alike
    assert backlog_s(slow[1]) >= 39 * 5.0 > backlog_s(slow[0])


def test_a_request_that_no_living_rank_can_encode_is_owed_nothing(encoding):
    state = encoding(ONE_ENCODES).state
    assert state.can_serve(state.trajectories[0])
    without = replace(state, ranks=(1, 2, 3))
    assert not without.can_serve(Trajectory(state.trajectories[0].request))
    assert without.can_serve(Trajectory.at(state.trajectories[0].request, 1, 3))


def test_a_scenario_has_its_encoders_on_the_first_ranks_and_plans_start_at_as_many():
    setting = prepare(Scenario(encoder_ranks=2))
    assert setting.stage_ranks == StageRanks.of({("", ENCODE): [0, 1]})
    assert not prepare(Scenario(encoder_ranks=8)).stage_ranks
    for number in (0, -1, 9):
        with pytest.raises(ConfigError, match=rf"^encoder-ranks is {number}; allowed: 1 to 8$"):
            prepare(Scenario(encoder_ranks=number))
    sizing = find_smallest_pool(
        Scenario(encoder_ranks=3, num_requests=40, rate_per_min=6, slo_scale=1.5), target=0.9, policies="lookahead",
        seeds=range(2), max_ranks=8,
    )  # fmt: skip
    assert min(size.num_ranks for size in sizing.sizes) >= 3
