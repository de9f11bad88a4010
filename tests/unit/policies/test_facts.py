"""Facts are worked out once, and again when what they rest on has changed."""

from __future__ import annotations

import dataclasses

import pytest

from tetriserve.core.plan import State
from tetriserve.core.stages import DECODE
from tetriserve.core.trajectory import Trajectory
from tetriserve.policies.facts import Facts


@pytest.fixture
def derived():
    """Request ids in the order in which facts about them were worked out."""
    return []


@pytest.fixture
def facts(derived):
    def derive(trajectory, terms):
        derived.append(trajectory.request_id)
        return trajectory.request_id, terms

    return Facts(lambda request, state: state.cost.times(request, request.stage_of(DECODE))[1], derive)


@pytest.fixture
def state_of(flux):
    return lambda trajectories, cost=flux: State(tuple(trajectories), (), (0,), cost)


def test_what_stays_the_same_is_worked_out_once(facts, derived, request_of, state_of):
    trajectories = [Trajectory(request_of(256, request_id=name)) for name in "ab"]
    new = Trajectory(request_of(256, request_id="c"))
    assert facts.of(trajectories, state_of(trajectories)) == [("a", 0.005), ("b", 0.005)]
    assert facts.of([new, *trajectories], state_of(trajectories)) == [("c", 0.005), ("a", 0.005), ("b", 0.005)]
    assert derived == ["a", "b", "c"]


def test_a_trajectory_that_went_on_is_another(facts, derived, request_of, state_of):
    before = Trajectory(request_of(256, request_id="a"))
    after = dataclasses.replace(before, steps_done=1)
    facts.of([before], state_of([before]))
    facts.of([after], state_of([after]))
    assert derived == ["a", "a"]


def test_new_terms_change_their_own_kind_alone(facts, derived, request_of, state_of, flux):
    trajectories = [Trajectory(request_of(size, request_id=str(size))) for size in (256, 512)]
    facts.of(trajectories, state_of(trajectories))
    slower = dataclasses.replace(flux, decode={**flux.decode, 512: 0.5})
    assert facts.of(trajectories, state_of(trajectories, slower)) == [("256", 0.005), ("512", 0.5)]
    assert derived == ["256", "512", "512"]


def test_what_is_gone_is_forgotten(facts, derived, request_of, state_of):
    trajectory = Trajectory(request_of(256, request_id="a"))
    for present in ([trajectory], [], [trajectory]):
        facts.of(present, state_of(present))
    assert derived == ["a", "a"]
