"""Arrival processes: their rates, their shapes, their determinism."""

from __future__ import annotations

import random
import statistics
from itertools import islice, pairwise

import pytest

from tetriserve.core.errors import ConfigError
from tetriserve.workload.arrivals import ARRIVALS, Constant, Gamma, OnOff, Poisson, Step, parse_arrivals


def times_of(process, count: int, seed: int = 0) -> list[float]:
    return list(islice(process.times(random.Random(seed)), count))


def gaps_of(process, count: int) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times_of(process, count))]


@pytest.mark.parametrize("name", ARRIVALS)
def test_times_ascend_and_follow_from_the_seed_alone(name: str) -> None:
    process = parse_arrivals(name, 30)
    times = times_of(process, 500)
    assert times == sorted(times) and times[0] > 0
    assert times == times_of(process, 500)
    assert name == "constant" or times != times_of(process, 500, seed=1)


@pytest.mark.parametrize("name", ["poisson", "constant", "gamma", "on-off"])
def test_the_mean_rate_is_the_one_asked_for(name: str) -> None:
    last = times_of(parse_arrivals(name, 30), 20_000)[-1]
    assert 20_000 / (last / 60) == pytest.approx(30, rel=0.05)


def test_constant_gaps_are_all_equal() -> None:
    assert times_of(Constant(rate_per_min=12), 3) == [5.0, 10.0, 15.0]


@pytest.mark.parametrize(("process", "cv"), [(Poisson(rate_per_min=60), 1.0), (Gamma(rate_per_min=60, cv=3), 3.0)])
def test_gaps_vary_as_much_as_asked(process, cv: float) -> None:
    gaps = gaps_of(process, 20_000)
    assert statistics.fmean(gaps) == pytest.approx(1.0, rel=0.06)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.06)


def test_nothing_arrives_in_the_off_phase_and_the_on_phase_makes_up_for_it() -> None:
    times = times_of(OnOff(rate_per_min=60, on_s=10, off_s=30), 4000)
    assert all(time % 40 < 10 for time in times)
    assert sum(time < 400 for time in times) == pytest.approx(400, rel=0.15)


def test_the_rate_steps_at_the_time_given() -> None:
    times = times_of(Step(rate_per_min=60, at_s=1000, factor=4), 9000)
    assert sum(time <= 1000 for time in times) == pytest.approx(1000, rel=0.08)
    assert sum(1000 < time <= 2000 for time in times) == pytest.approx(4000, rel=0.04)


def test_settings_are_read_from_the_name() -> None:
    assert parse_arrivals("on-off:on_s=5,off_s=1", 12) == OnOff(rate_per_min=12, on_s=5, off_s=1)
    assert parse_arrivals("gamma", 12) == Gamma(rate_per_min=12, cv=3)


@pytest.mark.parametrize(
    ("spec", "rate", "message"),
    [
        ("tidal", 12, "unknown arrivals 'tidal'; choose one of: poisson, constant, gamma[:cv=3], on-off[:on_s=30,off"),
        ("gamma:cw=2", 12, "arrivals 'gamma:cw=2': cannot use 'cw=2'; write gamma[:cv=3]"),
        ("poisson:cv=2", 12, "arrivals 'poisson:cv=2': cannot use 'cv=2'; write poisson"),
        ("gamma:cv=x", 12, "arrivals 'gamma:cv=x': cv is 'x'; it must be a number above 0"),
        ("step:at_s=-1", 12, "arrivals 'step:at_s=-1': at_s is -1; allowed: 0.001 to 1e+06"),
        ("poisson", -3, "rate is -3; allowed: 0.001 to 1e+06"),
        ("poisson", 0, "rate is 0; allowed: 0.001 to 1e+06"),
        ("poisson", float("nan"), "rate is nan; allowed: 0.001 to 1e+06"),
    ],
)
def test_what_cannot_be_is_named(spec: str, rate: float, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arrivals(spec, rate)
    assert str(caught.value).startswith(message)
