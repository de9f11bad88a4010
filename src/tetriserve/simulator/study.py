"""Many scenarios, the same policies and seeds: every run once, spread over processes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from types import TracebackType
from typing import Any, Self, TypeVar

from tetriserve.simulator.comparison import Comparison, PolicyResult, PolicyTally, SeedBound, comparison_of, seed_bound
from tetriserve.simulator.run import simulate
from tetriserve.simulator.scenario import Scenario, Setting, prepare
from tetriserve.workload.outcome import Outcome

T = TypeVar("T")
OnProgress = Callable[[int, int], None]

_NO_POLICY = ""


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """One policy on one seed's workload: the unit of work."""

    scenario: Scenario
    policy: str
    seed: int


class Study:
    """Answers questions about scenarios and remembers what it simulated: questions may overlap.

    Answers do not depend on the number of processes. To be used as a context manager.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        *,
        num_processes: int = 1,
        on_progress: OnProgress = lambda done, total: None,
    ) -> None:
        """
        Args:
            num_processes: 1 runs everything in this process.
            on_progress: told, after each run, how many of a question's new runs are done, and how many there are.
        """
        self.seeds = tuple(seeds)
        self._on_progress = on_progress
        self._known: dict[tuple[Callable[[WorkUnit], Any], WorkUnit], Any] = {}
        self._pool = _pool(num_processes) if num_processes > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def compare(
        self, scenarios: Sequence[Scenario], policies: Sequence[str], *, has_bound: bool = True
    ) -> list[Comparison]:
        """What `simulator.comparison.compare` says of each scenario.

        Raises:
            ConfigError: a scenario or a policy cannot be used; said before anything runs.
        """
        for scenario in scenarios:
            setting = prepare(scenario)
            for policy in policies:
                setting.policy(policy)
        tallies = self._answer(_tally, self._units(scenarios, policies))
        bounded = [scenario for scenario in scenarios if has_bound and not scenario.noise]
        bounds = self._answer(_bound, self._units(bounded, [_NO_POLICY]))

        def result(scenario: Scenario, policy: str) -> PolicyResult:
            return PolicyTally.merged(tallies[WorkUnit(scenario, policy, seed)] for seed in self.seeds).result(policy)

        return [
            comparison_of(
                [result(scenario, policy) for policy in policies],
                [bounds[unit] for unit in self._units([scenario], [_NO_POLICY]) if unit in bounds],
                len(self.seeds),
            )
            for scenario in scenarios
        ]

    def outcomes(self, scenario: Scenario, policies: Sequence[str]) -> dict[str, list[tuple[Outcome, ...]]]:
        """Every policy's runs, one per seed, request by request in the order in which they ended."""
        runs = self._answer(_outcomes, self._units([scenario], policies))
        return {policy: [runs[WorkUnit(scenario, policy, seed)] for seed in self.seeds] for policy in policies}

    def _units(self, scenarios: Sequence[Scenario], policies: Sequence[str]) -> list[WorkUnit]:
        return [
            WorkUnit(scenario, policy, seed) for scenario in scenarios for policy in policies for seed in self.seeds
        ]

    def _answer(self, work: Callable[[WorkUnit], T], units: Iterable[WorkUnit]) -> dict[WorkUnit, T]:
        units = tuple(dict.fromkeys(units))
        new = [unit for unit in units if (work, unit) not in self._known]
        answers: Iterator[T] = map(work, new) if self._pool is None else self._pool.map(work, new)
        for number, (unit, answer) in enumerate(zip(new, answers, strict=True), 1):
            self._known[work, unit] = answer
            self._on_progress(number, len(new))
        return {unit: self._known[work, unit] for unit in units}


def _pool(num_processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        num_processes,
        # A fork would copy the locks of threads that draw a progress display.
        mp_context=get_context("forkserver"),
        # Ctrl-C is for the parent, which then stops them.
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )


@lru_cache(maxsize=64)
def _setting(scenario: Scenario) -> Setting:
    return prepare(scenario)


def _run(unit: WorkUnit) -> Iterator[Outcome]:
    setting = _setting(unit.scenario)
    return simulate(
        setting.policy(unit.policy),
        setting.cost,
        setting.requests(unit.seed),
        num_ranks=setting.num_ranks,
        noise=setting.noise,
        late_share=setting.late_share,
        stage_ranks=setting.stage_ranks,
        nodes=setting.nodes,
        seed=unit.seed,
    )


def _tally(unit: WorkUnit) -> PolicyTally:
    tally = PolicyTally()
    tally.take_run(_run(unit))
    return tally


def _outcomes(unit: WorkUnit) -> tuple[Outcome, ...]:
    return tuple(_run(unit))


def _bound(unit: WorkUnit) -> SeedBound:
    return seed_bound(_setting(unit.scenario), unit.seed)
