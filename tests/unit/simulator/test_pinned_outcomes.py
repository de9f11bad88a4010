"""Every policy's simulated outcomes, to the last digit: what changes the shape of the code must not change them.

A change that is meant to change schedules writes the digests anew and says why:
`python -m tests.unit.simulator.test_pinned_outcomes`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from tetriserve.simulator.run import simulate
from tetriserve.simulator.scenario import Scenario, Setting, prepare

DIGESTS = Path(__file__).with_suffix(".json")
CELLS = [*product(("uniform", "skewed"), (12.0, 36.0), (1.0, 1.25, 1.5))]
"""Mix, requests per minute, SLO scale."""
NUM_REQUESTS = 25
VARIANTS = ("tetriserve:step_granularity=5", "tetriserve:fill=off", "unsteady")


def cells() -> Iterator[Setting]:
    for mix, rate, scale in CELLS:
        yield prepare(Scenario(mix=mix, rate_per_min=rate, slo_scale=scale, num_requests=NUM_REQUESTS, noise=0.05))


def policies() -> list[str]:
    return [*next(cells()).policies("all"), *VARIANTS]


def digest(policy: str) -> str:
    """Of which tasks ran when and where, for every request of every cell."""
    sha = hashlib.sha256()
    for setting in cells():
        outcomes = simulate(
            setting.policy(policy), setting.cost, setting.requests(0), num_ranks=setting.num_ranks,
            noise=setting.noise, seed=0,
        )  # fmt: skip
        for outcome in sorted(outcomes, key=lambda outcome: outcome.request.request_id):
            runs = [(run.start_s.hex(), run.end_s.hex(), run.task.ranks, run.task.num_steps) for run in outcome.runs]
            fact = (outcome.request.request_id, str(outcome.status), f"{outcome.predicted_finish_s:.9f}", runs)
            sha.update(json.dumps(fact).encode())
    return sha.hexdigest()[:16]


@pytest.mark.parametrize("policy", policies())
def test_outcomes_are_those_that_are_pinned(policy: str) -> None:
    assert digest(policy) == json.loads(DIGESTS.read_text())[policy]


if __name__ == "__main__":
    DIGESTS.write_text(json.dumps({policy: digest(policy) for policy in policies()}, indent=2) + "\n")
