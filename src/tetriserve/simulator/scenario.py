"""What is simulated: profiles, a pool and a workload, all from one frozen description."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tetriserve.core.bounds import MAX_RANKS, check_range
from tetriserve.core.cluster import ANYWHERE, ONE_NODE, Nodes, StageRanks
from tetriserve.core.errors import ConfigError
from tetriserve.core.plan import LATE_SHARE, CostModel
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import encoders_on_first
from tetriserve.policies.policy import Policy
from tetriserve.policies.registry import POLICIES, PolicyContext, make_policy, warn_of_long_rounds
from tetriserve.profile.by_model import CostByModel
from tetriserve.simulator.models import PooledModel, SimulatedModel, open_models
from tetriserve.workload.arrivals import parse_arrivals
from tetriserve.workload.cache import NO_CACHE, Cache, parse_cache
from tetriserve.workload.mixes import WeightedMix, parse_mix, parse_mix_of_models
from tetriserve.workload.slo import DeadlineRule, RuleByModel
from tetriserve.workload.synthesis import Portion, Synthesis
from tetriserve.workload.traces import Steps, load_trace

ALL_POLICIES = "all"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """As the user writes it.

    profile, num_steps, num_passes, slo_scale, slo_multiple: of the one model, as `SimulatedModel` has them.
    models: several models that share the pool; then the fields of one model are not used.
    mix: of sizes, as `parse_mix` reads it; of several models, as `parse_mix_of_models` does.
    num_ranks: None takes the profile's largest degree.
    ranks_per_node: the pool is of nodes with so many ranks each; None: it is one node.
    encoder_ranks: the first so many ranks encode, and no others; None: all do.
    noise: standard deviation of a task's duration, as a fraction of it.
    late_share: part of the pool's rank time that is owed to the request longest overdue.
    trace: requests from this file; then rate, arrivals, mix and number of requests are not used.
    cache: an approximate cache that lets requests skip steps, as `parse_cache` reads it.
    """

    profile: str = "flux.1-dev-8xh100"
    models: tuple[SimulatedModel, ...] = ()
    mix: str = "uniform"
    arrivals: str = "poisson"
    rate_per_min: float = 12.0
    slo_scale: float = 1.0
    slo_multiple: float | None = None
    num_requests: int = 300
    num_steps: int | None = None
    num_passes: int | None = None
    num_ranks: int | None = None
    ranks_per_node: int | None = None
    encoder_ranks: int | None = None
    noise: float = 0.0
    late_share: float = LATE_SHARE
    trace: Path | None = None
    cache: str = NO_CACHE

    @property
    def simulated(self) -> tuple[SimulatedModel, ...]:
        """Its models; one without a key where there is one."""
        return self.models or (
            SimulatedModel(
                profile=self.profile,
                num_steps=self.num_steps,
                num_passes=self.num_passes,
                slo_scale=self.slo_scale,
                slo_multiple=self.slo_multiple,
            ),
        )

    @property
    def profile_name(self) -> str:
        """The profiles' names without folder and suffix."""
        names = [
            Path(model.profile).stem if model.profile.endswith(".json") else model.profile for model in self.simulated
        ]
        if not self.models:
            return names[0]
        return ", ".join(f"{model.key}={name}" for model, name in zip(self.models, names, strict=True))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A scenario made ready: everything that can be wrong with it has been checked.

    slack_s: how long a request of the smallest measured size can wait, by the scenario's deadlines: of the model where
        that is shortest.
    """

    models: tuple[PooledModel, ...]
    cost: CostModel
    num_ranks: int
    slack_s: float
    noise: float
    source: Synthesis | tuple[Request, ...]
    cache: Cache | None = None
    late_share: float = LATE_SHARE
    stage_ranks: StageRanks = ANYWHERE
    nodes: Nodes = ONE_NODE

    @property
    def kinds(self) -> tuple[tuple[str, Shape], ...]:
        """The models and shapes that requests have, smallest shape first."""
        if isinstance(self.source, Synthesis):
            found = {(portion.model, shape) for portion in self.source.portions for shape in portion.mix.shapes}
        else:
            found = {(request.model, request.shape) for request in self.source}
        return tuple(sorted(found, key=lambda kind: (kind[1].num_pixels, kind[1], kind[0])))

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes that requests have, smallest first."""
        return tuple(dict.fromkeys(shape for _, shape in self.kinds))

    @property
    def probes(self) -> tuple[Request, ...]:
        """A request of each model and measured shape."""
        return tuple(request for model in self.models for request in model.probes)

    @property
    def least_ranks(self) -> int:
        """Of a pool that runs every model."""
        return max(model.least_degree for model in self.models)

    @property
    def num_requests(self) -> int:
        """Of one seed's workload."""
        return self.source.num_requests if isinstance(self.source, Synthesis) else len(self.source)

    @property
    def varies_by_seed(self) -> bool:
        return self.noise > 0 or self.cache is not None or isinstance(self.source, Synthesis)

    def requests(self, seed: int) -> Iterator[Request]:
        """The workload of one seed, in order of arrival; but for the steps it is the same with and without a cache."""
        if isinstance(self.source, Synthesis):
            requests = self.source.requests(random.Random(seed))
        else:
            requests = iter(self.source)
        return requests if self.cache is None else self.cache.shorten(requests, random.Random(f"cache {seed}"))

    def policy(self, spec: str) -> Policy:
        """
        Raises:
            ConfigError: unknown, or an argument that is not allowed here.
        """
        return make_policy(spec, self.cost, num_ranks=self.num_ranks, probes=self.probes, slack_s=self.slack_s)

    def policies(self, specs: str) -> list[str]:
        """The policies in a list with commas; `all` is every registered one, `fixed` at each degree.

        An item such as `fill=off` is one more setting of the policy before it.

        Raises:
            ConfigError: a policy is unknown, or cannot be made.
        """
        names: list[str] = []
        for item in (item.strip() for item in specs.split(",")):
            if item == ALL_POLICIES:
                names += self._all_policies()
            elif "=" in item.partition(":")[0] and names:
                names[-1] += f",{item}"
            else:
                names.append(item)
        names = list(dict.fromkeys(names))
        for name in names:
            warn_of_long_rounds(name, self.policy(name), self.slack_s)
        return names

    def _all_policies(self) -> list[str]:
        context = PolicyContext(argument="", cost=self.cost, num_ranks=self.num_ranks, probes=self.probes)
        names = []
        for name, spec in POLICIES.items():
            if name == "fixed":
                names += [f"fixed:{degree}" for degree in context.degrees]
            elif not spec.is_for_study and ":" not in spec.usage.partition("[")[0]:
                names.append(name)
        return names


def parse_nodes(text: str) -> tuple[int, int]:
    """The number of nodes and of ranks on each.

    Raises:
        ConfigError: not two whole numbers above 0.

    >>> parse_nodes("4x8")
    (4, 8)
    """
    numbers = text.split("x")
    if len(numbers) != 2 or not all(number.isascii() and number.isdigit() and int(number) for number in numbers):
        raise ConfigError(f"nodes is {text!r}; write the number of nodes and of ranks on each, such as 4x8")
    return int(numbers[0]), int(numbers[1])


def prepare(scenario: Scenario) -> Setting:
    """Open the files and check the numbers.

    Raises:
        ConfigError: one line that says what is wrong and what is allowed.
    """
    if scenario.num_ranks is not None:
        check_range("ranks", scenario.num_ranks, 1, MAX_RANKS)
    if scenario.ranks_per_node is not None:
        check_range("ranks-per-node", scenario.ranks_per_node, 1, MAX_RANKS)
    models, num_ranks = open_models(scenario.simulated, scenario.num_ranks, scenario.ranks_per_node)
    if scenario.ranks_per_node is not None and num_ranks % scenario.ranks_per_node:
        raise ConfigError(f"ranks is {num_ranks}; with {scenario.ranks_per_node} ranks per node it must be a multiple")
    if scenario.encoder_ranks is not None:
        check_range("encoder-ranks", scenario.encoder_ranks, 1, num_ranks)
    check_range("noise", scenario.noise, 0.0, 1.0)
    check_range("late-share", scenario.late_share, 0, 1)
    by_key = {model.key: model for model in models}
    is_one = list(by_key) == [""]
    setting = Setting(
        models=models,
        cost=models[0].cost if is_one else CostByModel({model.key: model.cost for model in models}),
        num_ranks=num_ranks,
        slack_s=min(model.slack_s for model in models),
        noise=scenario.noise,
        late_share=scenario.late_share,
        stage_ranks=encoders_on_first(scenario.encoder_ranks, num_ranks),
        nodes=Nodes(scenario.ranks_per_node),
        source=_source(
            scenario,
            by_key,
            models[0].deadlines if is_one else RuleByModel({model.key: model.deadlines for model in models}),
        ),
        cache=parse_cache(scenario.cache),
    )
    for key, shape in setting.kinds:
        by_key[key].check_covered(shape)
    return setting


def _source(
    scenario: Scenario, models: Mapping[str, PooledModel], deadlines: DeadlineRule
) -> Synthesis | tuple[Request, ...]:
    if scenario.trace is not None:
        steps = {key: Steps(model.num_steps, model.num_passes) for key, model in models.items()}
        return tuple(load_trace(scenario.trace, default_steps=steps, deadlines=deadlines))
    synthesis = Synthesis(
        arrivals=parse_arrivals(scenario.arrivals, scenario.rate_per_min),
        portions=_portions(scenario.mix, models),
        deadlines=deadlines,
        num_requests=scenario.num_requests,
    )
    for portion in synthesis.portions:
        for shape in portion.mix.shapes:
            models[portion.model].check_covered(shape)
            models[portion.model].check_deadline(shape)
    return synthesis


def _portions(mix: str, models: Mapping[str, PooledModel]) -> tuple[Portion, ...]:
    shapes = {key: model.profile.shapes for key, model in models.items()}
    is_one = list(models) == [""]
    mixes = {"": WeightedMix(parse_mix(mix, shapes[""]))} if is_one else parse_mix_of_models(mix, shapes)
    return tuple(
        Portion(
            model=key,
            mix=weighted.mix,
            weight=weighted.weight,
            num_steps=models[key].num_steps,
            num_passes=models[key].num_passes,
        )
        for key, weighted in mixes.items()
    )
