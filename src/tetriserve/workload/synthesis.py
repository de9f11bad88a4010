"""Requests made up from an arrival process, a mix of sizes and a deadline rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from tetriserve.core.bounds import MAX_REQUESTS, MAX_STEPS, check_range
from tetriserve.core.request import Request
from tetriserve.core.stages import image_stages
from tetriserve.workload.arrivals import Arrivals
from tetriserve.workload.mixes import Mix
from tetriserve.workload.randomness import RandomSource
from tetriserve.workload.slo import DeadlineRule


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """What is made up, all but the randomness."""

    arrivals: Arrivals
    mix: Mix
    deadlines: DeadlineRule
    num_requests: int
    num_steps: int

    def __post_init__(self) -> None:
        check_range("requests", self.num_requests, 1, MAX_REQUESTS)
        check_range("steps", self.num_steps, 1, MAX_STEPS)

    def requests(self, random: RandomSource) -> Iterator[Request]:
        """The requests in order of arrival, one at a time: a long workload need not fit in memory."""
        stages = image_stages(self.num_steps)
        for number, arrival_s in enumerate(islice(self.arrivals.times(random), self.num_requests)):
            request = Request(
                request_id=f"r{number}",
                prompt="",
                shape=self.mix.draw(random),
                stages=stages,
                seed=random.getrandbits(32),
                arrival_s=arrival_s,
                deadline_s=arrival_s,
            )
            yield replace(request, deadline_s=arrival_s + self.deadlines.slo_s(request))
