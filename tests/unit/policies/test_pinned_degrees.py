"""A request may name the degrees that its steps run at; every policy keeps to them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tetriserve.core.stages import DENOISE
from tetriserve.simulator.run import simulate
from tetriserve.simulator.scenario import Scenario, prepare

SETTING = prepare(Scenario(mix="skewed", rate_per_min=60.0, num_requests=24))


@pytest.mark.parametrize("policy", [*SETTING.policies("all"), "unsteady"])
def test_every_policy_keeps_to_the_degrees_of_a_request(policy: str) -> None:
    pins = ((1,), (2, 4), (8,), None)
    requests = [replace(r, degrees=pins[number % 4]) for number, r in enumerate(SETTING.requests(0))]
    ended = list(simulate(SETTING.policy(policy), SETTING.cost, requests, num_ranks=8))
    assert len(ended) == len(requests)
    for outcome in ended:
        degrees = {run.task.degree for run in outcome.runs if run.task.stage == DENOISE}
        allowed = outcome.request.degrees
        if policy.startswith("fixed:") and allowed is not None and min(allowed) > int(policy[6:]):
            assert not degrees  # no block is wide enough
        else:
            assert degrees, "it was served"
            assert allowed is None or degrees <= set(allowed)
