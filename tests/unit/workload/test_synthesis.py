"""Made-up requests: complete, in order, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

import pytest

from tetriserve.core.bounds import MAX_REQUESTS
from tetriserve.core.errors import ConfigError
from tetriserve.core.request import Shape
from tetriserve.workload.arrivals import Constant, Poisson
from tetriserve.workload.mixes import homogeneous, uniform
from tetriserve.workload.randomness import RandomSource
from tetriserve.workload.slo import TableRule
from tetriserve.workload.synthesis import Portion, Synthesis

SHAPES = tuple(Shape(side, side) for side in (256, 512, 1024, 2048))


def test_each_request_has_its_arrival_and_its_sizes_deadline() -> None:
    synthesis = Synthesis(
        arrivals=Constant(rate_per_min=60),
        portions=(Portion(mix=homogeneous(Shape(512, 512)), num_steps=28),),
        deadlines=TableRule(1.5),
        num_requests=3,
    )
    requests = list(synthesis.requests(random.Random(0)))
    assert [request.arrival_s for request in requests] == [1.0, 2.0, 3.0]
    assert [request.deadline_s for request in requests] == [4.0, 5.0, 6.0]
    assert [request.request_id for request in requests] == ["r0", "r1", "r2"]
    assert {(request.shape, request.num_steps) for request in requests} == {(Shape(512, 512), 28)}


def test_the_seed_decides_everything() -> None:
    synthesis = Synthesis(
        arrivals=Poisson(rate_per_min=24),
        portions=(Portion(mix=uniform(SHAPES), num_steps=28),),
        deadlines=TableRule(),
        num_requests=50,
    )
    requests = list(synthesis.requests(random.Random(3)))
    assert requests == list(synthesis.requests(random.Random(3)))
    assert requests != list(synthesis.requests(random.Random(4)))
    assert len({request.seed for request in requests}) == 50


def test_a_long_workload_is_made_one_request_at_a_time() -> None:
    class Five:
        def times(self, random: RandomSource) -> Iterator[float]:
            yield from (0.0, 1.0, 2.0, 3.0, 4.0)
            raise AssertionError("a sixth was made")

    synthesis = Synthesis(
        arrivals=Five(),
        portions=(Portion(mix=uniform(SHAPES), num_steps=1),),
        deadlines=TableRule(),
        num_requests=MAX_REQUESTS,
    )
    assert len(list(islice(synthesis.requests(random.Random(3)), 5))) == 5


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"num_requests": 0, "num_steps": 28}, "requests is 0; allowed: 1 to 1000000"),
        ({"num_requests": 300, "num_steps": -1}, "steps is -1; allowed: 1 to 1000"),
    ],
)
def test_numbers_below_one_are_refused(numbers: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Synthesis(
            arrivals=Poisson(rate_per_min=24),
            portions=(Portion(mix=uniform(SHAPES), num_steps=numbers["num_steps"]),),
            deadlines=TableRule(),
            num_requests=numbers["num_requests"],
        )
