"""Requests made up from an arrival process, mixes of sizes and a deadline rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from tetriserve.core.bounds import MAX_REQUESTS, MAX_STEPS, check_range
from tetriserve.core.request import Request
from tetriserve.core.stages import image_stages
from tetriserve.workload.arrivals import Arrivals
from tetriserve.workload.mixes import Mix
from tetriserve.workload.randomness import RandomSource, draw
from tetriserve.workload.slo import DeadlineRule


@dataclass(frozen=True, kw_only=True)
class Portion:
    """The requests of one model.

    num_passes: of the model in each step, and of its text encoders.
    model: its key; empty where there is one model.
    weight: how often it is asked for, beside the weights of the others.
    """

    mix: Mix
    num_steps: int
    num_passes: int = 1
    model: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_range("steps", self.num_steps, 1, MAX_STEPS)


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """What is made up, all but the randomness. portions: one for each model, at least one."""

    arrivals: Arrivals
    portions: tuple[Portion, ...]
    deadlines: DeadlineRule
    num_requests: int

    def __post_init__(self) -> None:
        check_range("requests", self.num_requests, 1, MAX_REQUESTS)

    def requests(self, random: RandomSource) -> Iterator[Request]:
        """The requests in order of arrival, one at a time: a long workload need not fit in memory."""
        for number, arrival_s in enumerate(islice(self.arrivals.times(random), self.num_requests)):
            portion = self._draw(random)
            request = Request(
                request_id=f"r{number}",
                prompt="",
                shape=portion.mix.draw(random),
                stages=image_stages(portion.num_steps, portion.num_passes),
                seed=random.getrandbits(32),
                arrival_s=arrival_s,
                deadline_s=arrival_s,
                model=portion.model,
            )
            yield replace(request, deadline_s=arrival_s + self.deadlines.slo_s(request))

    def _draw(self, random: RandomSource) -> Portion:
        """A single model takes no number from `random`: seeds mean the same workloads as ever."""
        if len(self.portions) == 1:
            return self.portions[0]
        return draw(random, self.portions, [portion.weight for portion in self.portions])
