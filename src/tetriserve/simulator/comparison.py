"""Policies side by side on the same workloads: what each attains, how long requests take, what it costs."""

from __future__ import annotations

import math
import statistics
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tetriserve.core.request import Request, Shape
from tetriserve.simulator.run import simulate
from tetriserve.simulator.scenario import Setting
from tetriserve.workload.outcome import Outcome, Status
from tetriserve.workload.percentiles import percentile

_STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
"""Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom."""

Part = TypeVar("Part", str, Shape)
OnOutcome = Callable[[str, int, Outcome], None]


@dataclass(slots=True)
class PolicyTally:
    """Counts over the outcomes of one policy, all seeds together.

    sars: the SLO attainment ratio of each seed.
    totals, attained: requests by model and shape.
    latencies_s: of the requests that finished.
    gpu_time_s: rank-seconds, summed.
    """

    sars: list[float] = field(default_factory=list)
    totals: Counter[tuple[str, Shape]] = field(default_factory=Counter)
    attained: Counter[tuple[str, Shape]] = field(default_factory=Counter)
    latencies_s: array[float] = field(default_factory=lambda: array("d"))
    gpu_time_s: float = 0.0

    def take_run(self, outcomes: Iterable[Outcome]) -> None:
        """Add one seed's run."""
        total = attained = 0
        gpu_time_s = 0.0
        for outcome in outcomes:
            kind = outcome.request.model, outcome.request.shape
            total += 1
            attained += outcome.is_attained
            self.totals[kind] += 1
            self.attained[kind] += outcome.is_attained
            gpu_time_s += outcome.gpu_time_s
            if outcome.status is Status.FINISHED:
                self.latencies_s.append(outcome.latency_s)
        self.gpu_time_s += gpu_time_s
        self.sars.append(attained / total)

    @classmethod
    def merged(cls, tallies: Iterable[PolicyTally]) -> PolicyTally:
        """The tally of all their runs, in this order."""
        merged = cls()
        for tally in tallies:
            merged.sars += tally.sars
            merged.totals.update(tally.totals)
            merged.attained.update(tally.attained)
            merged.latencies_s += tally.latencies_s
            merged.gpu_time_s += tally.gpu_time_s
        return merged

    def result(self, policy: str) -> PolicyResult:
        latencies = array("d", sorted(self.latencies_s))
        return PolicyResult(
            policy=policy,
            sar=statistics.fmean(self.sars),
            sar_half_width=half_width(self.sars),
            sar_by_shape=self._sar_by(lambda kind: kind[1]),
            sar_by_model=self._sar_by(lambda kind: kind[0]),
            mean_latency_s=statistics.fmean(latencies) if latencies else math.nan,
            p50_latency_s=percentile(latencies, 50),
            p99_latency_s=percentile(latencies, 99),
            gpu_time_s=self.gpu_time_s / len(self.sars),
            latencies_s=latencies,
        )

    def _sar_by(self, part: Callable[[tuple[str, Shape]], Part]) -> dict[Part, float]:
        """The attainment ratio over all seeds of what `part` says of model and shape, in its order."""
        totals, attained = Counter[Part](), Counter[Part]()
        for kind, total in self.totals.items():
            totals[part(kind)] += total
            attained[part(kind)] += self.attained[kind]
        return {each: attained[each] / totals[each] for each in sorted(totals)}


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """One policy: a row of the table.

    sar: SLO attainment ratio, mean over seeds, give or take `sar_half_width` (95 %; None for a single seed).
    sar_by_shape, sar_by_model: of the requests of each, over all seeds.
    latencies: of the requests that finished, over all seeds, `latencies_s` ascending; NaN where none did.
    gpu_time_s: rank-seconds per seed.
    """

    policy: str
    sar: float
    sar_half_width: float | None
    sar_by_shape: dict[Shape, float]
    sar_by_model: dict[str, float]
    mean_latency_s: float
    p50_latency_s: float
    p99_latency_s: float
    gpu_time_s: float
    latencies_s: Sequence[float] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All policies.

    bound: a SAR that no scheduler exceeds, mean over seeds; None where it was not computed.
    bound_by_model: of each model's requests over all seeds, if the pool were theirs alone: no scheduler reaches all of
        these at once. None where there is one model.
    """

    results: tuple[PolicyResult, ...]
    bound: float | None
    num_seeds: int
    bound_by_model: dict[str, float] | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """The models' keys; none where there is one model, which has no key."""
        return tuple(key for key in self.results[0].sar_by_model if key)


def compare(
    setting: Setting,
    policies: Sequence[str],
    seeds: Sequence[int],
    *,
    has_bound: bool = True,
    on_run: Callable[[str], None] = lambda text: None,
    on_outcome: OnOutcome | None = None,
) -> Comparison:
    """Run every policy on every seed's workload.

    Args:
        has_bound: compute the upper bound too. With noise there is none: tasks may be quicker than the profile says.
        on_run: told what runs now.
        on_outcome: told policy, seed and outcome of every request, in the order in which they end.
    """
    results = []
    for policy in policies:
        tally = PolicyTally()
        for seed in seeds:
            on_run(f"{policy}, seed {seed}")
            outcomes = simulate(
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
            tally.take_run(outcomes if on_outcome is None else _told(outcomes, policy, seed, on_outcome))
        results.append(tally.result(policy))
    bounds = []
    for seed in seeds if has_bound and not setting.noise else ():
        on_run(f"upper bound, seed {seed}")
        bounds.append(seed_bound(setting, seed))
    return comparison_of(results, bounds, len(seeds))


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % confidence interval of the mean (Student's t); None for fewer than two values."""
    freedom = len(values) - 1
    if freedom < 1:
        return None
    quantile = _STUDENT_T[freedom - 1] if freedom <= len(_STUDENT_T) else 1.96 + 2.4 / freedom
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def _told(outcomes: Iterable[Outcome], policy: str, seed: int, on_outcome: OnOutcome) -> Iterable[Outcome]:
    for outcome in outcomes:
        on_outcome(policy, seed, outcome)
        yield outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedBound:
    """What no scheduler exceeds on one seed's workload: the SAR, and how many requests of each model by itself.

    attained, totals: by model; empty where there is one model.
    """

    sar: float
    attained: Counter[str]
    totals: Counter[str]


def comparison_of(results: Sequence[PolicyResult], bounds: Sequence[SeedBound], num_seeds: int) -> Comparison:
    """bounds: of every seed, or none."""
    attained = sum((bound.attained for bound in bounds), Counter[str]())
    totals = sum((bound.totals for bound in bounds), Counter[str]())
    return Comparison(
        results=tuple(results),
        bound=statistics.fmean(bound.sar for bound in bounds) if bounds else None,
        num_seeds=num_seeds,
        bound_by_model={model: attained[model] / totals[model] for model in sorted(totals)} or None,
    )


def sar_bound(setting: Setting, seed: int) -> float:
    """A SAR that no scheduler exceeds on one seed's workload; see `simulator.bound`."""
    from tetriserve.simulator.bound import max_attained  # loads scipy, which only a bound needs

    requests = list(setting.requests(seed))
    return max_attained(requests, setting.cost, setting.num_ranks) / len(requests)


def seed_bound(setting: Setting, seed: int) -> SeedBound:
    """`sar_bound`, and the same of each model's requests without those of the others."""
    from tetriserve.simulator.bound import max_attained

    by_model: dict[str, list[Request]] = {}
    for request in setting.requests(seed) if len(setting.models) > 1 else ():
        by_model.setdefault(request.model, []).append(request)
    return SeedBound(
        sar=sar_bound(setting, seed),
        attained=Counter(
            {key: max_attained(requests, setting.cost, setting.num_ranks) for key, requests in by_model.items()}
        ),
        totals=Counter({key: len(requests) for key, requests in by_model.items()}),
    )
