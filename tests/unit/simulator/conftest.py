"""Times and workloads for the simulator's tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest

from tetriserve.core.plan import CostModel, Task
from tetriserve.core.request import Request, Shape, Stage
from tetriserve.core.stages import DECODE, ENCODE, image_stages
from tetriserve.profile import ProfileCost
from tetriserve.profile.bundled import open_profile
from tetriserve.workload.arrivals import parse_arrivals
from tetriserve.workload.mixes import parse_mix
from tetriserve.workload.slo import TableRule
from tetriserve.workload.synthesis import Portion, Synthesis


@dataclass(frozen=True)
class TableCost:
    """Step times by height; the other stages take no time unless said.

    decode: at degree 1, or by degree.
    """

    steps: Mapping[int, Mapping[int, float]]
    encode: float = 0.0
    decode: float | Mapping[int, float] = 0.0
    switch_s: float = 0.0
    move_s: float = 0.0
    move_node_s: float = 0.0
    team_s: float = 0.0
    max_batch: int = 1

    def times(self, request: Request, stage: Stage, batch: int = 1) -> Mapping[int, float]:
        decode = self.decode if isinstance(self.decode, Mapping) else {1: self.decode}
        return {ENCODE: {1: self.encode}, DECODE: decode}.get(stage.kind, self.steps[request.shape.height])

    def joins_passes(self, request: Request, stage: Stage, degree: int, batch: int) -> bool:
        return False

    def observed(self, task: Task, request: Request, elapsed_s: float) -> CostModel:
        return self


@pytest.fixture(scope="session")
def table_cost() -> type[TableCost]:
    return TableCost


@pytest.fixture(scope="session")
def flux() -> ProfileCost:
    return ProfileCost(open_profile("flux.1-dev-8xh100"))


@pytest.fixture(scope="session")
def request_of() -> Callable[..., Request]:
    def build(
        arrival_s: float, deadline_s: float, *, num_steps: int = 1, height: int = 256, name: str = "r"
    ) -> Request:
        return Request(
            request_id=name, prompt="", shape=Shape(height, height), stages=image_stages(num_steps), seed=0,
            arrival_s=arrival_s, deadline_s=deadline_s,
        )  # fmt: skip

    return build


@pytest.fixture(scope="session")
def workload(flux: ProfileCost) -> Callable[..., list[Request]]:
    """Requests as in the paper's evaluation."""

    def build(
        *, mix: str = "uniform", rate: float = 24, scale: float = 1.2, count: int = 60, seed: int = 0
    ) -> list[Request]:
        synthesis = Synthesis(
            arrivals=parse_arrivals("poisson", rate),
            portions=(Portion(mix=parse_mix(mix, flux.profile.shapes), num_steps=28),),
            deadlines=TableRule(scale),
            num_requests=count,
        )
        return list(synthesis.requests(random.Random(seed)))

    return build
