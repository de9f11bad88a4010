"""The approximate cache: how many steps it saves, that it changes nothing else, and what is refused."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from tetriserve.core.errors import ConfigError
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.simulator.comparison import compare
from tetriserve.simulator.run import simulate
from tetriserve.simulator.scenario import Scenario, prepare
from tetriserve.workload.cache import Cache, parse_cache
from tetriserve.workload.traces import load_trace, save_trace


def requests(count: int, num_steps: int) -> list[Request]:
    return [
        Request(
            request_id=f"r{number}", prompt="", shape=Shape(256, 256), stages=image_stages(num_steps), seed=0,
            arrival_s=float(number), deadline_s=number + 1.5,
        )
        for number in range(count)
    ]  # fmt: skip


def test_nirvana_skips_each_of_five_numbers_of_steps_equally_often_and_a_fifth_of_all_steps() -> None:
    cache = parse_cache("nirvana")
    assert cache is not None
    left = Counter(request.num_steps for request in cache.shorten(requests(20_000, 50), random.Random(1)))
    assert set(left) == {50, 45, 40, 35, 30, 25}
    assert left[50] / 20_000 == pytest.approx(0.3, abs=0.01)
    assert all(left[steps] / 20_000 == pytest.approx(0.14, abs=0.01) for steps in (45, 40, 35, 30, 25))
    saved = 1 - sum(steps * count for steps, count in left.items()) / (50 * 20_000)
    assert saved == pytest.approx(0.21, abs=0.005)


@pytest.mark.parametrize(("num_steps", "left"), [(50, 40), (28, 22), (20, 16), (4, 3), (2, 2), (1, 1)])
def test_other_numbers_of_steps_skip_the_same_part_and_run_one_at_least(num_steps, left) -> None:
    always = Cache((10,), (1.0,))
    (request,) = always.shorten(requests(1, num_steps), random.Random(0))
    assert request.num_steps == left
    (shortest,) = Cache((49,), (1.0,)).shorten(requests(1, num_steps), random.Random(0))
    assert shortest.num_steps == 1


def test_a_hit_rate_or_shares_can_be_given() -> None:
    assert parse_cache("none") is None
    assert parse_cache("nirvana:0.5") == Cache((5, 10, 15, 20, 25), (0.1,) * 5)
    assert parse_cache("10:0.3, 25:0.2") == Cache((10, 25), (0.3, 0.2))
    never = Cache((10,), (0.0,))
    assert {request.num_steps for request in never.shorten(requests(50, 28), random.Random(0))} == {28}


@pytest.mark.parametrize("scenario", [Scenario(num_requests=80), Scenario(num_requests=80, slo_multiple=1.5)])
def test_only_the_steps_differ_from_the_workload_without_a_cache(scenario) -> None:
    plain = list(prepare(scenario).requests(3))
    cached = list(prepare(replace(scenario, cache="nirvana")).requests(3))
    assert [replace(request, stages=image_stages(28)) for request in cached] == plain
    assert len({request.num_steps for request in cached}) == 6
    assert cached == list(prepare(replace(scenario, cache="nirvana")).requests(3))
    other = prepare(replace(scenario, cache="nirvana")).requests(4)
    assert [request.num_steps for request in cached] != [request.num_steps for request in other]


def test_a_replayed_trace_can_have_a_cache_and_then_varies_by_seed(tmp_path) -> None:
    save_trace(requests(30, 50), tmp_path / "t.csv")
    setting = prepare(Scenario(trace=tmp_path / "t.csv", cache="25:0.5"))
    assert setting.varies_by_seed
    runs = [[request.num_steps for request in setting.requests(seed)] for seed in (0, 1)]
    assert runs[0] != runs[1]
    assert set(runs[0]) == {25, 50}


def test_a_run_with_a_cache_is_saved_and_replayed_with_its_steps(tmp_path) -> None:
    setting = prepare(Scenario(num_requests=30, cache="nirvana:0.9"))
    outcomes = simulate(setting.policy("tetriserve"), setting.cost, setting.requests(0), num_ranks=8)
    assert all(len(outcome.degrees) == outcome.request.num_steps for outcome in outcomes)
    save_trace(setting.requests(0), tmp_path / "t.jsonl")
    replayed = load_trace(tmp_path / "t.jsonl", default_steps=28, deadlines=setting.source.deadlines)
    assert [request.num_steps for request in replayed] == [request.num_steps for request in setting.requests(0)]


def test_it_raises_what_policies_attain_and_the_bound() -> None:
    scenario = Scenario(mix="skewed", num_requests=60, num_steps=50)
    plain, cached = (
        compare(prepare(each), ["rssp", "tetriserve"], [0, 1])
        for each in (scenario, replace(scenario, cache="nirvana"))
    )
    assert plain.bound is not None
    assert cached.bound is not None
    assert cached.bound > plain.bound + 0.05
    for before, after in zip(plain.results, cached.results, strict=True):
        assert before.sar + 0.05 < after.sar <= cached.bound + 1e-12


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("redis", "unknown cache 'redis'; choose one of: none, nirvana[:HIT_RATE], or skipped steps of 50"),
        ("nirvana:1.2", "cache 'nirvana:1.2': the hit rate is 1.2; allowed: 0 to 1"),
        ("nirvana:often", "cache 'nirvana:often': 'often' is not a number"),
        ("10", "cache '10': cannot use '10'; write none, "),
        ("10:0.3,x:1", "cache '10:0.3,x:1': cannot use 'x:1'; write none, "),
        ("10:0.3,10:0.2", "cache '10:0.3,10:0.2' names 10 steps twice; give each one share"),
        ("50:0.3", "cache '50:0.3': a hit skips 50 steps; allowed: 1 to 49"),
        ("10:-0.1", "cache '10:-0.1': the share of hits that skip 10 steps is -0.1; allowed: 0 to 1"),
        ("10:0.6,20:0.6", "cache '10:0.6,20:0.6': the shares of hits add up to 1.2; allowed: 1 at most"),
        ("10:nan", "cache '10:nan': the share of hits that skip 10 steps is nan; allowed: 0 to 1"),
    ],
)
def test_what_cannot_be_a_cache_is_named(spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(Scenario(cache=spec))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
