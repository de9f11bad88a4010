"""Many scenarios, the same policies and seeds: every run once, spread over processes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from statistics import fmean
from types import TracebackType
from typing import Any, Self, TypeVar

from tetriserve.simulator.comparison import Comparison, Result, Tally, sar_bound
from tetriserve.simulator.run import simulate
from tetriserve.simulator.scenario import Scenario, Setting, prepare
from tetriserve.workload.outcome import Outcome

T = TypeVar("T")
OnProgress = Callable[[int, int], None]

_NO_POLICY = ""


@dataclass(frozen=True, slots=True)
class Trial:
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
        self._known: dict[tuple[Callable[[Trial], Any], Trial], Any] = {}
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
        tallies = self._answer(_tally, self._trials(scenarios, policies))
        bounded = [scenario for scenario in scenarios if has_bound and not scenario.noise]
        bounds = self._answer(_bound, self._trials(bounded, [_NO_POLICY]))

        def result(scenario: Scenario, policy: str) -> Result:
            return Tally.merged(tallies[Trial(scenario, policy, seed)] for seed in self.seeds).result(policy)

        def bound(scenario: Scenario) -> float | None:
            found = [bounds[trial] for trial in self._trials([scenario], [_NO_POLICY]) if trial in bounds]
            return fmean(found) if found else None

        return [
            Comparison(
                results=tuple(result(scenario, policy) for policy in policies),
                bound=bound(scenario),
                num_seeds=len(self.seeds),
            )
            for scenario in scenarios
        ]

    def outcomes(self, scenario: Scenario, policies: Sequence[str]) -> dict[str, list[tuple[Outcome, ...]]]:
        """Every policy's runs, one per seed, request by request in the order in which they ended."""
        runs = self._answer(_outcomes, self._trials([scenario], policies))
        return {policy: [runs[Trial(scenario, policy, seed)] for seed in self.seeds] for policy in policies}

    def _trials(self, scenarios: Sequence[Scenario], policies: Sequence[str]) -> list[Trial]:
        return [Trial(scenario, policy, seed) for scenario in scenarios for policy in policies for seed in self.seeds]

    def _answer(self, work: Callable[[Trial], T], trials: Iterable[Trial]) -> dict[Trial, T]:
        trials = tuple(dict.fromkeys(trials))
        new = [trial for trial in trials if (work, trial) not in self._known]
        answers: Iterator[T] = map(work, new) if self._pool is None else self._pool.map(work, new)
        for number, (trial, answer) in enumerate(zip(new, answers, strict=True), 1):
            self._known[work, trial] = answer
            self._on_progress(number, len(new))
        return {trial: self._known[work, trial] for trial in trials}


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


def _run(trial: Trial) -> Iterator[Outcome]:
    setting = _setting(trial.scenario)
    return simulate(
        setting.policy(trial.policy),
        setting.cost,
        setting.requests(trial.seed),
        num_ranks=setting.num_ranks,
        noise=setting.noise,
        late_share=setting.late_share,
        seed=trial.seed,
    )


def _tally(trial: Trial) -> Tally:
    tally = Tally()
    tally.take_run(_run(trial))
    return tally


def _outcomes(trial: Trial) -> tuple[Outcome, ...]:
    return tuple(_run(trial))


def _bound(trial: Trial) -> float:
    return sar_bound(_setting(trial.scenario), trial.seed)
