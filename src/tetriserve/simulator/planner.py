"""How many GPUs hold a target? The smallest pool, found by simulation between an upper bound and a confidence interval.

**Held** means: with one of the policies, the lower end of the 95 % confidence interval of the SAR (Student's t over the
seeds, two-sided) is not below the target. The interval is never narrower than 3 / requests on either side: where not
one of n requests was late, up to 3 / n of all may be (the rule of three). A trace without noise is simulated once and
has no interval: its SAR itself must reach the target.

**What is not simulated.** Pools whose upper bound, mean over the same seeds, is below the target: no scheduler holds it
there. The bound grows with the pool, so bisection finds where that ends. Policies stop once they have missed more
deadlines than the target allows over all seeds, which decides nothing that the other seeds could change; and those that
fall `FAR_BEHIND` the best on the first seed stop there, which could. Whichever policy does best is shown with its own
interval, as if it had been chosen beforehand.

**The search** grows the pool in doubling steps until the target is held, then bisects. What a policy attains need not
grow with the pool: with some an odd pool is worse than a smaller even one. So the search goes on downwards until two
sizes in a row do not hold the target, and also looks at the next larger size. Smaller ones may still exist, further
below, that would hold it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from tetriserve.core.bounds import MAX_RANKS, check_range
from tetriserve.core.errors import ConfigError
from tetriserve.simulator.comparison import PolicyTally, half_width, sar_bound
from tetriserve.simulator.run import simulate
from tetriserve.simulator.scenario import Scenario, Setting, prepare

STEP_GRANULARITIES = (1, 2, 5, 10)
"""Fixed lengths of a round that are tried for `tetriserve`, unless one is named."""
MIN_SEEDS = 3
"""So many seeds, for the curve, of a policy that could be given up earlier."""
FAR_BEHIND = 0.05
NUM_BELOW = 2
"""Sizes in a row below the answer that must not hold the target."""
RULE_OF_THREE = 3.0
_ROUNDING = 1e-9

OnSimulate = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyScore:
    """What one policy attains on one pool.

    sars: the SLO attainment ratio of each seed that was simulated.
    half_width: of the 95 % confidence interval; None after a single seed.
    is_held: whether the interval, over all seeds, lies above the target.
    """

    policy: str
    sars: tuple[float, ...]
    half_width: float | None
    is_held: bool

    @property
    def sar(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.sars)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSize:
    """One size of the pool.

    ranks_per_node: None where the pool is one node.
    bound: a SAR that no scheduler exceeds, mean over the seeds that the best policy was simulated on or, without one,
        that it took to rule the target out; None with noise.
    scores: best policy first; none where the bound rules the target out.
    """

    num_ranks: int
    bound: float | None
    scores: tuple[PolicyScore, ...]
    ranks_per_node: int | None = None

    @property
    def num_nodes(self) -> int:
        return 1 if self.ranks_per_node is None else self.num_ranks // self.ranks_per_node

    @property
    def title(self) -> str:
        """In words."""
        if self.ranks_per_node is None:
            return f"{self.num_ranks} GPUs"
        return f"{self.num_nodes} {'node' if self.num_nodes == 1 else 'nodes'} of {self.ranks_per_node} GPUs"

    @property
    def best(self) -> PolicyScore | None:
        return self.scores[0] if self.scores else None

    @property
    def is_held(self) -> bool:
        return any(score.is_held for score in self.scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """The answer: the smallest pool found that holds `target`, None if none does; and all pools looked at, by size."""

    target: float
    num_seeds: int
    answer: PoolSize | None
    sizes: tuple[PoolSize, ...]


def find_smallest_pool(
    scenario: Scenario,
    *,
    target: float,
    policies: str,
    seeds: Sequence[int] = range(10),
    max_ranks: int = 64,
    on_simulate: OnSimulate = lambda text: None,
) -> Sizing:
    """The smallest number of ranks on which one of `policies` holds a SAR of `target`; see the module.

    Args:
        scenario: the workload; its own number of ranks is not used. With `ranks_per_node` only pools of whole nodes are
            looked at.
        on_simulate: told what runs now.

    Raises:
        ConfigError: the scenario or a policy cannot be used, or the target cannot be shown with so many requests.
    """
    if not 0 < target <= 1:
        raise ConfigError(f"target is {target:g}; it must be above 0 and at most 1")
    check_range("max-ranks", max_ranks, 1, MAX_RANKS)
    unit = 1 if scenario.ranks_per_node is None else scenario.ranks_per_node
    check_range("ranks-per-node", unit, 1, max_ranks)
    largest = prepare(replace(scenario, num_ranks=max_ranks // unit * unit))
    if largest.varies_by_seed and len(seeds) < 2:
        raise ConfigError(f"seeds is {len(seeds)}; a confidence interval needs at least 2")
    if not largest.varies_by_seed:
        seeds = seeds[:1]
    elif 1 - RULE_OF_THREE / (len(seeds) * largest.num_requests) < target:
        raise ConfigError(
            f"target is {target:g}; {len(seeds)} seeds of {largest.num_requests} requests can show "
            f"{1 - RULE_OF_THREE / (len(seeds) * largest.num_requests):.4g} at most: raise --seeds or --requests"
        )
    names = tuple(_with_rounds(largest.policies(policies)))
    return _Search(scenario, target, names, tuple(seeds), max_ranks // unit, on_simulate).find()


class _Search:
    """One search; remembers what it has simulated. Sizes are numbers of nodes where the scenario has them."""

    def __init__(
        self,
        scenario: Scenario,
        target: float,
        policies: Sequence[str],
        seeds: Sequence[int],
        max_size: int,
        on_simulate: OnSimulate,
    ) -> None:
        self._unit = scenario.ranks_per_node or 1
        self._scenario = scenario
        self._target = target
        self._policies = policies
        self._seeds = seeds
        self._max_size = max_size
        self._on_simulate = on_simulate
        self._settings: dict[int, Setting] = {}
        self._bounds: dict[tuple[int, int], float] = {}
        self._sizes: dict[int, PoolSize] = {}

    def find(self) -> Sizing:
        least_ranks = max(self._setting(self._max_size).least_ranks, self._scenario.encoder_ranks or 1)
        least = -(-least_ranks // self._unit)
        if not self._is_possible(self._max_size):
            self._note(self._max_size, ())
            answer = None
        else:
            floor = self._least(least, self._max_size, self._is_possible)
            answer = self._grow(floor)
        if answer is not None and answer < self._max_size:
            self._holds(answer + 1)
        return Sizing(
            target=self._target,
            num_seeds=len(self._seeds),
            answer=None if answer is None else self._sizes[answer],
            sizes=tuple(self._sizes[size] for size in sorted(self._sizes)),
        )

    def _grow(self, floor: int) -> int | None:
        """Double the step until a size holds, bisect, and make sure downwards."""
        below, size, step = floor - 1, floor, 1
        while not self._holds(size) and size < self._max_size:
            below, size, step = size, min(size + step, self._max_size), 2 * step
        answer = self._least(below + 1, size, self._holds) if self._holds(size) else None
        lowest = size if answer is None else answer
        for smaller in range(lowest - 1, floor - 1, -1):
            if self._holds(smaller):
                answer = lowest = smaller
            elif lowest - smaller == NUM_BELOW:
                break
        return answer

    @staticmethod
    def _least(low: int, high: int, is_enough: Callable[[int], bool]) -> int:
        """By bisection the least from `low` to `high` that is enough, as `high` is."""
        while low < high:
            middle = (low + high) // 2
            if is_enough(middle):
                high = middle
            else:
                low = middle + 1
        return high

    def _is_possible(self, size: int) -> bool:
        """Whether the bound, mean over all seeds, leaves the target open. Stops at the seed that rules it out."""
        if self._scenario.noise:
            return True
        missed = 0.0
        for seed in self._seeds:
            missed += 1 - self._bound(size, seed)
            if self._is_too_much(missed):
                self._note(size, ())
                return False
        return True

    def _holds(self, size: int) -> bool:
        """Simulate a pool of this size, once."""
        if size not in self._sizes:
            first = {policy: self._sar(policy, size, self._seeds[0]) for policy in self._runnable(size)}
            enough = max(first.values(), default=0.0) - FAR_BEHIND
            scores = [self._score(policy, size, sar, sar >= enough) for policy, sar in first.items()]
            self._note(size, tuple(sorted(scores, key=lambda score: (not score.is_held, -score.sar))))
        return self._sizes[size].is_held

    def _score(self, policy: str, size: int, first_sar: float, goes_on: bool) -> PolicyScore:
        sars = [first_sar]
        for seed in self._seeds[1:] if goes_on else ():
            if len(sars) >= MIN_SEEDS and self._is_too_much(sum(1 - sar for sar in sars)):
                break
            sars.append(self._sar(policy, size, seed))
        setting = self._setting(size)
        spread = half_width(sars) if setting.varies_by_seed else None
        if spread is not None:
            spread = max(spread, RULE_OF_THREE / (len(sars) * setting.num_requests))
        low = statistics.fmean(sars) - (spread or 0.0)
        is_held = len(sars) == len(self._seeds) and low >= self._target - _ROUNDING
        return PolicyScore(policy=policy, sars=tuple(sars), half_width=spread, is_held=is_held)

    def _is_too_much(self, missed: float) -> bool:
        """Whether a sum over seeds of the missed share keeps the mean over all seeds below the target."""
        return missed > len(self._seeds) * (1 - self._target) + _ROUNDING

    def _note(self, size: int, scores: tuple[PolicyScore, ...]) -> None:
        bound = None
        if not self._scenario.noise:
            seeds = self._seeds[: len(scores[0].sars)] if scores else self._seeds
            bounds = [self._bound(size, seed) for seed in seeds if scores or (size, seed) in self._bounds]
            bound = statistics.fmean(bounds)
        self._sizes[size] = PoolSize(
            num_ranks=size * self._unit, bound=bound, scores=scores, ranks_per_node=self._scenario.ranks_per_node
        )

    def _bound(self, size: int, seed: int) -> float:
        key = (size, seed)
        if key not in self._bounds:
            self._on_simulate(f"{size * self._unit} GPUs: upper bound, seed {seed}")
            self._bounds[key] = sar_bound(self._setting(size), seed)
        return self._bounds[key]

    def _sar(self, policy: str, size: int, seed: int) -> float:
        self._on_simulate(f"{size * self._unit} GPUs: {policy}, seed {seed}")
        setting = self._setting(size)
        tally = PolicyTally()
        tally.take_run(
            simulate(
                setting.policy(policy),
                setting.cost,
                setting.requests(seed),
                num_ranks=setting.num_ranks,
                noise=setting.noise,
                late_share=setting.late_share,
                stage_ranks=setting.stage_ranks,
                nodes=setting.nodes,
                seed=seed,
            )
        )
        return tally.sars[0]

    def _runnable(self, size: int) -> Iterator[str]:
        """The policies that exist on so few ranks: `fixed:8` does not on 4."""
        for policy in self._policies:
            try:
                self._setting(size).policy(policy)
            except ConfigError:
                continue
            yield policy

    def _setting(self, size: int) -> Setting:
        if size not in self._settings:
            self._settings[size] = prepare(replace(self._scenario, num_ranks=size * self._unit))
        return self._settings[size]


def _with_rounds(policies: Sequence[str]) -> Iterator[str]:
    """`tetriserve` with rounds that adapt and once for every fixed length, unless it names one."""
    for policy in policies:
        name, _, argument = policy.partition(":")
        yield policy
        if name == "tetriserve" and "step_granularity" not in argument:
            for steps in STEP_GRANULARITIES:
                yield f"{name}:{','.join(filter(None, (argument, f'step_granularity={steps}')))}"
