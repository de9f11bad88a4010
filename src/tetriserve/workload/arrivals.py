"""When requests arrive: each process is an endless seeded sequence of times in seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from itertools import count
from typing import Protocol

from tetriserve.core.bounds import check_range
from tetriserve.core.errors import ConfigError
from tetriserve.workload.randomness import RandomSource

_RATES = (1e-3, 1e6)
_SETTINGS = (1e-3, 1e6)


class Arrivals(Protocol):
    """An arrival process."""

    def times(self, random: RandomSource) -> Iterator[float]:
        """Arrival times in seconds from 0, ascending, without end."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisson:
    """Independent arrivals (TetriServe, 6.1): gaps are exponential with mean 60 / `rate_per_min` seconds."""

    rate_per_min: float

    def times(self, random: RandomSource) -> Iterator[float]:
        now = 0.0
        while True:
            now += random.expovariate(self.rate_per_min / 60)
            yield now


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """One arrival every 60 / `rate_per_min` seconds, the first after one such gap."""

    rate_per_min: float

    def times(self, random: RandomSource) -> Iterator[float]:
        return (number * 60 / self.rate_per_min for number in count(1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gamma:
    """Bursts: gamma-distributed gaps of mean 60 / `rate_per_min` seconds.

    cv: coefficient of variation of the gaps; 1 is Poisson, more is burstier.
    """

    rate_per_min: float
    cv: float = 3.0

    def times(self, random: RandomSource) -> Iterator[float]:
        shape = 1 / self.cv**2
        scale_s = 60 / self.rate_per_min / shape
        now = 0.0
        while True:
            now += random.gammavariate(shape, scale_s)
            yield now


@dataclass(frozen=True, slots=True, kw_only=True)
class OnOff:
    """Poisson arrivals for `on_s` seconds, none for `off_s`, and again; `rate_per_min` is the mean over both."""

    rate_per_min: float
    on_s: float = 30.0
    off_s: float = 30.0

    def times(self, random: RandomSource) -> Iterator[float]:
        period_s = self.on_s + self.off_s
        busy = Poisson(rate_per_min=self.rate_per_min * period_s / self.on_s)
        for on_time in busy.times(random):  # a clock that stands still while nothing arrives
            num_periods, within_s = divmod(on_time, self.on_s)
            yield num_periods * period_s + within_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Poisson arrivals whose rate is `rate_per_min` until `at_s` and `factor` times that from then on."""

    rate_per_min: float
    at_s: float = 300.0
    factor: float = 2.0

    def times(self, random: RandomSource) -> Iterator[float]:
        for steady_time in Poisson(rate_per_min=self.rate_per_min).times(random):
            yield steady_time if steady_time <= self.at_s else self.at_s + (steady_time - self.at_s) / self.factor


ARRIVALS: Mapping[str, type[Poisson | Constant | Gamma | OnOff | Step]] = {
    "poisson": Poisson,
    "constant": Constant,
    "gamma": Gamma,
    "on-off": OnOff,
    "step": Step,
}


def parse_arrivals(spec: str, rate_per_min: float) -> Arrivals:
    """The process that `spec` names, with its settings after a colon: `poisson`, `gamma:cv=2`, `on-off:on_s=10`.

    Raises:
        ConfigError: an unknown process or setting, or a number that is not above 0.
    """
    check_range("rate", rate_per_min, *_RATES)
    name, _, settings = spec.partition(":")
    process = ARRIVALS.get(name)
    if process is None:
        raise ConfigError(f"unknown arrivals {spec!r}; choose one of: {', '.join(map(_usage, ARRIVALS))}")
    values = {}
    known = _settings(name)
    for setting in filter(None, settings.split(",")):
        key, _, text = setting.partition("=")
        if key not in known:
            raise ConfigError(f"arrivals {spec!r}: cannot use {setting!r}; write {_usage(name)}")
        try:
            values[key] = float(text)
        except ValueError:
            raise ConfigError(f"arrivals {spec!r}: {key} is {text!r}; it must be a number above 0") from None
        check_range(f"arrivals {spec!r}: {key}", values[key], *_SETTINGS)
    return process(rate_per_min=rate_per_min, **values)


def _settings(name: str) -> dict[str, float]:
    """Settings of a process beside its rate, with their defaults."""
    return {field.name: field.default for field in fields(ARRIVALS[name]) if field.default is not MISSING}


def _usage(name: str) -> str:
    settings = ",".join(f"{key}={default:g}" for key, default in _settings(name).items())
    return f"{name}[:{settings}]" if settings else name
