"""What is simulated: a profile, a pool and a workload, all from one frozen description."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tetriserve.core.bounds import MAX_RANKS, MAX_STEPS, check_range
from tetriserve.core.cluster import ANYWHERE, StageRanks
from tetriserve.core.cost import narrowest_s
from tetriserve.core.errors import ConfigError, ProfileError
from tetriserve.core.plan import LATE_SHARE
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import encoders_on_first, image_stages
from tetriserve.policies.policy import Policy
from tetriserve.policies.registry import POLICIES, PolicyContext, make_policy, warn_of_long_rounds
from tetriserve.profile.bundled import open_profile
from tetriserve.profile.cost import ProfileCost
from tetriserve.workload.arrivals import parse_arrivals
from tetriserve.workload.cache import NO_CACHE, Cache, parse_cache
from tetriserve.workload.mixes import parse_mix
from tetriserve.workload.slo import DeadlineRule, MultipleRule, TableRule, slack_s
from tetriserve.workload.synthesis import Synthesis
from tetriserve.workload.traces import load_trace

ALL_POLICIES = "all"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """As the user writes it.

    profile: name of a bundled profile, or a path.
    slo_multiple: deadlines as a multiple of the time alone at degree 1; None takes the paper's table times `slo_scale`.
    num_ranks: None takes the profile's largest degree.
    encoder_ranks: the first so many ranks encode, and no others; None: all do.
    noise: standard deviation of a task's duration, as a fraction of it.
    late_share: part of the pool's rank time that is owed to the request longest overdue.
    trace: requests from this file; then rate, arrivals, mix and number of requests are not used.
    cache: an approximate cache that lets requests skip steps, as `parse_cache` reads it.
    """

    profile: str = "flux.1-dev-8xh100"
    mix: str = "uniform"
    arrivals: str = "poisson"
    rate_per_min: float = 12.0
    slo_scale: float = 1.0
    slo_multiple: float | None = None
    num_requests: int = 300
    num_steps: int = 28
    num_ranks: int | None = None
    encoder_ranks: int | None = None
    noise: float = 0.0
    late_share: float = LATE_SHARE
    trace: Path | None = None
    cache: str = NO_CACHE

    @property
    def profile_name(self) -> str:
        """The profile's name without folder and suffix."""
        return Path(self.profile).stem if self.profile.endswith(".json") else self.profile


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A scenario made ready: everything that can be wrong with it has been checked.

    slack_s: how long a request of the smallest measured size can wait, by the scenario's deadlines.
    """

    cost: ProfileCost
    num_ranks: int
    slack_s: float
    noise: float
    source: Synthesis | tuple[Request, ...]
    cache: Cache | None = None
    late_share: float = LATE_SHARE
    stage_ranks: StageRanks = ANYWHERE

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes that requests have, smallest first."""
        if isinstance(self.source, Synthesis):
            found: Iterable[Shape] = self.source.mix.shapes
        else:
            found = {request.shape for request in self.source}
        return tuple(sorted(found, key=lambda shape: (shape.num_pixels, shape)))

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
        shapes = self.cost.profile.shapes
        return make_policy(spec, self.cost, num_ranks=self.num_ranks, shapes=shapes, slack_s=self.slack_s)

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
        shapes = self.cost.profile.shapes
        context = PolicyContext(argument="", cost=self.cost, num_ranks=self.num_ranks, shapes=shapes)
        names = []
        for name, spec in POLICIES.items():
            if name == "fixed":
                names += [f"fixed:{degree}" for degree in context.degrees]
            elif not spec.is_for_study and ":" not in spec.usage.partition("[")[0]:
                names.append(name)
        return names


def prepare(scenario: Scenario) -> Setting:
    """Open the files and check the numbers.

    Raises:
        ConfigError: one line that says what is wrong and what is allowed.
    """
    profile = open_profile(scenario.profile)
    num_ranks = profile.degrees[-1] if scenario.num_ranks is None else scenario.num_ranks
    check_range("ranks", num_ranks, 1, MAX_RANKS)
    if scenario.encoder_ranks is not None:
        check_range("encoder-ranks", scenario.encoder_ranks, 1, num_ranks)
    check_range("steps", scenario.num_steps, 1, MAX_STEPS)
    check_range("noise", scenario.noise, 0.0, 1.0)
    check_range("late-share", scenario.late_share, 0, 1)
    degrees = tuple(degree for degree in profile.degrees if degree <= num_ranks)
    if not degrees:
        raise ConfigError(f"ranks is {num_ranks}; profile {scenario.profile} starts at degree {profile.degrees[0]}")
    cost = ProfileCost(profile, lambda shape: degrees)
    deadlines = _deadlines(scenario, cost)
    setting = Setting(
        cost=cost,
        num_ranks=num_ranks,
        slack_s=slack_s(profile.shapes, cost, deadlines, scenario.num_steps),
        noise=scenario.noise,
        late_share=scenario.late_share,
        stage_ranks=encoders_on_first(scenario.encoder_ranks, num_ranks),
        source=_source(scenario, cost, deadlines),
        cache=parse_cache(scenario.cache),
    )
    for shape in setting.shapes:
        _check_covered(shape, scenario, cost)
    return setting


def _deadlines(scenario: Scenario, cost: ProfileCost) -> DeadlineRule:
    if scenario.slo_multiple is None:
        return TableRule(scenario.slo_scale)
    return MultipleRule(scenario.slo_multiple, cost)


def _source(scenario: Scenario, cost: ProfileCost, deadlines: DeadlineRule) -> Synthesis | tuple[Request, ...]:
    if scenario.trace is not None:
        return tuple(load_trace(scenario.trace, default_steps=scenario.num_steps, deadlines=deadlines))
    synthesis = Synthesis(
        arrivals=parse_arrivals(scenario.arrivals, scenario.rate_per_min),
        mix=parse_mix(scenario.mix, cost.profile.shapes),
        deadlines=deadlines,
        num_requests=scenario.num_requests,
        num_steps=scenario.num_steps,
    )
    for shape in synthesis.mix.shapes:
        _check_covered(shape, scenario, cost)
        deadlines.slo_s(_probe(shape))
    return synthesis


def _check_covered(shape: Shape, scenario: Scenario, cost: ProfileCost) -> None:
    """Every shape is checked before anything runs: a missing one would show only when it first arrives."""
    try:
        narrowest_s(cost, _probe(shape))
    except ProfileError as error:
        measured = ", ".join(map(str, cost.profile.shapes))
        raise ProfileError(
            f"profile {scenario.profile} does not cover {shape}: {error} (measured: {measured})"
        ) from error


def _probe(shape: Shape) -> Request:
    stages = image_stages(1)
    return Request(request_id="probe", prompt="", shape=shape, stages=stages, seed=0, arrival_s=0.0, deadline_s=0.0)
