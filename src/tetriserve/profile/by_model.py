"""The cost model of a pool that serves several models: each request is asked of its own model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from tetriserve.core.models import of_model
from tetriserve.core.plan import CostModel, Task
from tetriserve.core.request import Request, Stage


@dataclass(frozen=True)
class CostByModel:
    """The `CostModel` of several models. `costs` are theirs, by key; the first is that of requests without one.

    What a task costs beside its stage does not depend on its request in the protocol: it is the most of any model.
    """

    costs: Mapping[str, CostModel]

    def times(self, request: Request, stage: Stage, batch: int = 1) -> Mapping[int, float]:
        """See `CostModel.times`."""
        return of_model(self.costs, request.model).times(request, stage, batch)

    def joins_passes(self, request: Request, stage: Stage, degree: int, batch: int) -> bool:
        """See `CostModel.joins_passes`."""
        return of_model(self.costs, request.model).joins_passes(request, stage, degree, batch)

    @cached_property
    def max_batch(self) -> int:
        """The most of any model: larger batches of another cost the sum of their members, and so do not pay."""
        return max(cost.max_batch for cost in self.costs.values())

    @cached_property
    def switch_s(self) -> float:
        return max(cost.switch_s for cost in self.costs.values())

    @cached_property
    def move_s(self) -> float:
        return max(cost.move_s for cost in self.costs.values())

    @cached_property
    def move_node_s(self) -> float:
        return max(cost.move_node_s for cost in self.costs.values())

    @cached_property
    def team_s(self) -> float:
        return max(cost.team_s for cost in self.costs.values())

    @cached_property
    def lora_s(self) -> float:
        return max(cost.lora_s for cost in self.costs.values())

    def observed(self, task: Task, request: Request, elapsed_s: float) -> CostByModel:
        """The same model after one task, of which `request` is a member, took `elapsed_s`; `self` is unchanged."""
        key = request.model or next(iter(self.costs))
        return replace(self, costs={**self.costs, key: self.costs[key].observed(task, request, elapsed_s)})
