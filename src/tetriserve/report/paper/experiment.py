"""What the paper's figures have in common: workloads, policies, and a study that runs them once for all figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from tetriserve.core.cost import stages_gpu_s
from tetriserve.report.command import command_of
from tetriserve.simulator.comparison import Comparison, PolicyResult
from tetriserve.simulator.scenario import Scenario, Setting, prepare
from tetriserve.simulator.study import Study

MIXES = ("uniform", "skewed")
RATES = (12.0, 24.0, 36.0)
"""Requests per minute. The paper's is 12; policies that know deadlines differ more at the other two."""
SCALES = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5)
TYPICAL_RATE, TYPICAL_SCALE = 24.0, 1.2
"""Where a figure shows one cell only."""
OURS = ("tetriserve", "lookahead")
BASELINES = ("rssp", "edf-best-fit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """
    base: profile, pool, number of requests, steps and arrivals; figures set mix, rate and SLO.
    fixed: `fixed:K` for each degree K of the pool.
    others: the other policies of the comparisons.
    clock: seconds, for the one table that shows how long something takes here.
    """

    study: Study
    base: Scenario
    fixed: tuple[str, ...]
    others: tuple[str, ...]
    has_bound: bool
    clock: Callable[[], float]

    @property
    def policies(self) -> tuple[str, ...]:
        return (*self.fixed, *self.others)

    def cell(self, mix: str, rate_per_min: float, slo_scale: float) -> Scenario:
        return replace(self.base, mix=mix, rate_per_min=rate_per_min, slo_scale=slo_scale)

    def compare(
        self, scenarios: Sequence[Scenario], policies: Sequence[str] = (), *, has_bound: bool = True
    ) -> list[Comparison]:
        """One comparison per scenario, of `policies` or else all of them."""
        return self.study.compare(scenarios, policies or self.policies, has_bound=has_bound and self.has_bound)

    def command(self, scenario: Scenario, policies: Sequence[str] = ()) -> str:
        """What prints one of the comparisons again."""
        return command_of(scenario, policies or self.policies, self.study.seeds)


def fixed_degrees_of(setting: Setting) -> tuple[str, ...]:
    """`fixed:K` for each degree K that the pool can run."""
    return tuple(name for name in setting.policies("all") if name.startswith("fixed:"))


def at_load(scenario: Scenario, load: float) -> Scenario:
    """`scenario` at the rate, to three digits, at which the least GPU time of what arrives is `load` of the pool's.

    Every model is asked for as often, and every size of a model.
    """
    setting = prepare(scenario)
    least_s = fmean(
        fmean(stages_gpu_s(model.cost, probe, probe.stages) for probe in model.probes) for model in setting.models
    )
    return replace(scenario, rate_per_min=float(f"{60 * load * setting.num_ranks / least_s:.3g}"))


def best_fixed(comparison: Comparison) -> PolicyResult:
    """The fixed degree that attains most."""
    return max((r for r in comparison.results if r.policy.startswith("fixed:")), key=lambda result: result.sar)


def result_of(comparison: Comparison, policy: str) -> PolicyResult:
    return next(result for result in comparison.results if result.policy == policy)


def in_words(comparison: Comparison) -> str:
    """What the featured policies attain beside the best fixed degree and the bound, as part of a sentence."""
    fixed = best_fixed(comparison)
    ours = " and ".join(f"{policy} {result_of(comparison, policy).sar:.3f}" for policy in OURS)
    bound = "" if comparison.bound is None else f", of at most {comparison.bound:.3f}"
    return f"{ours}, the best fixed degree ({fixed.policy}) {fixed.sar:.3f}{bound}"
