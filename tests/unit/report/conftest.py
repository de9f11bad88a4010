"""A comparison and runs that the report's tests draw."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tetriserve.core.events import Run
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DENOISE, image_stages
from tetriserve.simulator.comparison import Comparison, compare
from tetriserve.simulator.scenario import Scenario, prepare
from tetriserve.workload.outcome import Outcome, Status

POLICIES = ["fixed:2", "rssp", "tetriserve", "lookahead"]


@pytest.fixture(scope="session")
def comparisons() -> list[Comparison]:
    """At 12 and at 36 requests per minute, two seeds."""
    return [
        compare(prepare(Scenario(mix="skewed", rate_per_min=rate, num_requests=40)), POLICIES, [0, 1])
        for rate in (12.0, 36.0)
    ]


@pytest.fixture(scope="session")
def outcome_of() -> Callable[..., Outcome]:
    def build(
        name: str,
        arrival_s: float,
        finish_s: float,
        *runs: tuple[float, float, tuple[int, ...]],
        slo_s: float = 10.0,
        status: Status = Status.FINISHED,
    ) -> Outcome:
        """Runs are (start, end, ranks) of denoise tasks."""
        request = Request(
            request_id=name, prompt="", shape=Shape(1024, 1024), stages=image_stages(4), seed=0,
            arrival_s=arrival_s, deadline_s=arrival_s + slo_s,
        )  # fmt: skip
        tasks = tuple(Run(Task((name,), DENOISE, ranks, 1), start, end) for start, end, ranks in runs)
        return Outcome(request=request, status=status, runs=tasks, predicted_finish_s=0.0, finish_s=finish_s)

    return build
