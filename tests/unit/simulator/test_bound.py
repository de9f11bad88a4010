"""The upper bound: exact where that is known, and never below what any policy attains."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetriserve.policies.registry import POLICIES, make_policy
from tetriserve.simulator import bound
from tetriserve.simulator.bound import max_attained
from tetriserve.simulator.run import simulate

quick = settings(max_examples=60, deadline=None, derandomize=True)
SPECS = [
    *(name for name, spec in POLICIES.items() if not spec.is_for_study and ":" not in spec.usage.partition("[")[0]),
    "exhaustive:nodes=100",
    "fixed:1",
    "fixed:2",
    "fixed:4",
]


def most_on_one_rank(jobs: list[tuple[int, int, int]]) -> int:
    """The most of (arrival, deadline, unit steps) that one rank can finish: every subset, earliest deadline first."""

    def fits(subset: tuple[tuple[int, int, int], ...]) -> bool:
        left = [steps for _, _, steps in subset]
        for now in range(max((deadline for _, deadline, _ in subset), default=0)):
            ready = [i for i, (arrival, _, _) in enumerate(subset) if arrival <= now and left[i]]
            if ready:
                first = min(ready, key=lambda i: subset[i][1])
                left[first] -= 1
                if not left[first] and now + 1 > subset[first][1]:
                    return False
        return not any(left)

    sizes = range(len(jobs), 0, -1)
    return next((size for size in sizes if any(map(fits, itertools.combinations(jobs, size)))), 0)


@quick
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=7))
def test_on_one_rank_it_is_exact(table_cost, request_of, jobs) -> None:
    jobs = [(arrival, arrival + window, steps) for arrival, window, steps in jobs]
    requests = [
        request_of(arrival, deadline, num_steps=steps, name=f"r{number}")
        for number, (arrival, deadline, steps) in enumerate(jobs)
    ]
    assert max_attained(requests, table_cost({256: {1: 1.0}}), 1) == most_on_one_rank(jobs)


@pytest.mark.parametrize(
    ("deadline_s", "num_ranks", "most"),
    [
        (3.9, 8, 0),  # ten steps take 4 s at 8 ranks
        (4.0, 8, 1),  # 32 of 32 GPU seconds
        (5.0, 8, 1),  # five steps at 8 ranks, five at 2: 22 of 40
        (6.0, 8, 4),  # all at 2 ranks: 4 times 12 of 48
        (10.0, 8, 8),  # all at 1 rank
        (10.0, 1, 1),
        (9.9, 1, 0),
        (60.0, 1, 6),
    ],
)
def test_equal_requests_that_arrive_together(table_cost, request_of, deadline_s, num_ranks, most) -> None:
    cost = table_cost({256: {1: 1.0, 2: 0.6, 8: 0.4}})
    requests = [request_of(0.0, deadline_s, num_steps=10, name=f"r{number}") for number in range(12)]
    assert max_attained(requests, cost, num_ranks) == most


def test_encode_and_decode_occupy_a_rank_too(table_cost, request_of) -> None:
    cost = table_cost({256: {1: 1.0}}, encode=0.5, decode=0.4, switch_s=0.1)
    requests = [request_of(0.0, 11.0, num_steps=1, name=f"r{number}") for number in range(9)]
    assert max_attained(requests, cost, 1) == 5  # 0.5 + 1.0 + 0.4 and three starts: 2.2 s each
    assert max_attained([request_of(0.0, 2.19)], cost, 1) == 0
    assert max_attained([request_of(0.0, 2.2)], cost, 1) == 1


def test_work_that_cannot_leave_a_busy_second_counts(table_cost, request_of) -> None:
    """Two long requests, each with a second of slack, need the second in which a short one must run."""
    cost = table_cost({256: {1: 1.0}})
    long = [request_of(0.0, 5.0, num_steps=4, name=f"long{number}") for number in range(2)]
    short = [request_of(2.0, 3.0, name=f"short{number}") for number in range(3)]
    assert max_attained(long, cost, 2) == 2
    assert max_attained([*long, *short[:2]], cost, 2) == 4
    assert max_attained([*long, *short], cost, 2) == 4
    tight = [request_of(0.0, 4.0, num_steps=4, name=f"tight{number}") for number in range(2)]
    assert max_attained([*tight, *short], cost, 2) == 2  # each tight one keeps a rank busy throughout


@pytest.mark.parametrize("spec", SPECS)
def test_no_policy_ever_exceeds_it(spec, table_cost, request_of) -> None:
    times = st.floats(0.02, 1.0)

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.data())
    def check(data) -> None:
        steps = {height: {degree: data.draw(times) for degree in (1, 2, 4)} for height in (256, 512)}
        degrees = data.draw(st.sampled_from([(1,), (1, 2), (1, 2, 4)]))
        decode = {degree: data.draw(times) / 4 for degree in degrees}
        cost = table_cost(steps, encode=data.draw(times) / 4, decode=decode, switch_s=0.01)
        requests, now = [], 0.0
        for number in range(data.draw(st.integers(1, 12))):
            now += data.draw(st.sampled_from([0.0, 0.1, 0.7]))
            window_s = data.draw(st.sampled_from([0.3, 1.0, 2.0, 4.0]))
            requests.append(
                request_of(
                    now,
                    now + window_s,
                    num_steps=data.draw(st.integers(1, 6)),
                    height=data.draw(st.sampled_from([256, 512])),
                    name=f"r{number}",
                )
            )
        shapes = tuple({request.shape for request in requests})
        outcomes = simulate(make_policy(spec, cost, num_ranks=4, shapes=shapes), cost, requests, num_ranks=4)
        attained = sum(outcome.is_attained for outcome in outcomes)
        assert attained <= max_attained(requests, cost, 4) <= max_attained(requests, cost, 4, is_relaxed=True)

    check()


@pytest.mark.parametrize(("mix", "rate"), [("uniform", 24), ("skewed", 36)])
def test_no_policy_exceeds_it_in_the_papers_setting(mix, rate, flux, workload) -> None:
    requests = workload(mix=mix, rate=rate, count=120, seed=2)
    most = max_attained(requests, flux, 8)
    for spec in [*SPECS, "fixed:8"]:
        policy = make_policy(spec, flux, num_ranks=8, shapes=flux.profile.shapes)
        attained = sum(outcome.is_attained for outcome in simulate(policy, flux, requests, num_ranks=8))
        assert attained <= most
    assert most < len(requests)


def test_cutting_into_blocks_only_relaxes(monkeypatch, flux, workload) -> None:
    requests = workload(mix="skewed", rate=36, count=120)
    whole = max_attained(requests, flux, 8)
    monkeypatch.setattr(bound, "BLOCK", 30)
    assert whole <= max_attained(requests, flux, 8) <= 120
    monkeypatch.setattr(bound, "BLOCK", 400)
    monkeypatch.setattr(bound, "NEAR", 4)
    assert whole <= max_attained(requests, flux, 8) <= 120


def test_the_order_of_requests_does_not_matter_and_none_attain_none(flux, workload) -> None:
    requests = workload(rate=36, count=50)
    assert max_attained(requests[::-1], flux, 8) == max_attained(requests, flux, 8)
    assert max_attained([], flux, 8) == 0


def test_300_requests_take_seconds_at_most(flux, workload) -> None:
    requests = workload(mix="skewed", rate=36, count=300)
    start = time.process_time()
    assert max_attained(requests, flux, 8) < 300
    assert time.process_time() - start < 15  # about 1 s on one core; the rest is for a busy machine
