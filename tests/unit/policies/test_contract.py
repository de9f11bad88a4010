"""Every policy through the same invariants; `drive` asserts the contract at every plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tetriserve.core.cluster import ONE_NODE, Nodes, StageRanks
from tetriserve.core.plan import InFlight, Plan, State, Task
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.core.trajectory import Trajectory

POLICIES = [
    "fcfs",
    "fixed:1",
    "fixed:2",
    "tetriserve",
    "tetriserve:placement=off",
    "tetriserve:scale_up=off",
    "tetriserve:fill=off",
    "tetriserve:step_granularity=1",
    "tetriserve:step_granularity=2,placement=off,scale_up=off,fill=off",
    "lookahead",
    "lookahead:promote=off,widen=off",
    "rssp",
    "rssp:backfill=on",
    "sjf",
    "srtf",
    "edf",
    "edf-best-fit",
    "disaggregate",
    "disaggregate:1",
    "exhaustive:nodes=100",
    "unsteady",
]
every_policy = pytest.mark.parametrize("spec", POLICIES)
# Fixtures of the session hold no state between examples.
quick = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

HEIGHTS = (256, 512, 1024)
seconds = st.floats(0.002, 2.0)


@st.composite
def step_tables(draw: st.DrawFn) -> dict[int, dict[int, float]]:
    """Any step times: also slower at wider degrees, also a shape that stays at degree 1."""
    degrees = st.sampled_from([(1,), (1, 2), (1, 2, 4), (1, 2, 4, 8)])
    tables = {height: {degree: draw(seconds) for degree in draw(degrees)} for height in HEIGHTS}
    return tables | {256: {1: draw(seconds), 2: draw(seconds)}}


@st.composite
def decode_tables(draw: st.DrawFn) -> dict[int, dict[int, float]]:
    """Any times, of one degree or of several."""
    degrees = st.sampled_from([(1,), (1,), (1, 2), (1, 2, 4), (1, 4, 8)])
    return {height: {degree: draw(seconds) for degree in draw(degrees)} for height in HEIGHTS}


@st.composite
def workloads(draw: st.DrawFn, request_of, max_size: int = 10, models: Sequence[str] = ("",)):
    """Arrivals in bursts, deadlines from long past to far away, three priority classes, one step to ten."""
    requests = []
    now = 0.0
    for index in range(draw(st.integers(1, max_size))):
        now += draw(st.sampled_from([0.0, 0.0, 0.05, 0.4, 3.0]))
        request = request_of(
            draw(st.sampled_from(HEIGHTS)),
            request_id=f"r{index}",
            arrival_s=now,
            deadline_s=now + draw(st.sampled_from([-1.0, 0.0, 0.5, 2.0, 5.0, 20.0, 1e4])),
            num_steps=draw(st.integers(1, 10)),
            priority=draw(st.integers(0, 2)),
        )
        requests.append(replace(request, model=draw(st.sampled_from(models))))
    return requests


def test_what_a_policy_is_given_cannot_be_changed(request_of, flux):
    """`drive` therefore compares states without copying them: a hash exists only where every part is immutable."""
    trajectory = replace(Trajectory.at(request_of(256), 1, 0), holders=(0, 1))
    state = State((trajectory,), (InFlight(1, Task(("r",), DENOISE, (0, 1), 2), 0.0, 1.0),), (0, 1), flux)
    assert hash((state.trajectories, state.in_flight, state.ranks, state.idle_ranks, state.waiting))
    for value in (state, trajectory, trajectory.request, state.in_flight[0], state.in_flight[0].task):
        for field in fields(value):
            with pytest.raises(FrozenInstanceError):
                setattr(value, field.name, None)
    with pytest.raises(TypeError):
        flux.times(trajectory.request, trajectory.request.stage_of(DENOISE))[1] = 0.0


@every_policy
def test_every_request_completes_on_any_profile(spec, drive, make, request_of, table_cost):
    @quick
    @given(data=st.data())
    def check(data):
        steps = data.draw(step_tables())
        decode = data.draw(decode_tables())
        cost = table_cost(steps, decode, encode=data.draw(seconds), switch_s=data.draw(st.sampled_from([1e-4, 0.02])))
        num_ranks = data.draw(st.sampled_from([2, 3, 4, 8]))
        requests = data.draw(workloads(request_of))
        run = drive(make(spec, cost, num_ranks), requests, cost, num_ranks=num_ranks)
        assert set(run.finish_s) == {request.request_id for request in requests}

    check()


@every_policy
def test_every_request_completes_with_jitter_and_dying_ranks(spec, drive, make, request_of, flux, death):
    @quick
    @given(data=st.data())
    def check(data):
        requests = data.draw(workloads(request_of))
        times = st.floats(0.0, 4.0)
        deaths = [
            death(at := data.draw(times), rank, at + data.draw(times))
            for rank in data.draw(st.lists(st.integers(0, 7), max_size=8, unique=True))
        ]
        run = drive(
            make(spec, flux),
            requests,
            flux,
            jitter=data.draw(st.sampled_from([0.0, 0.02, 0.3])),
            timer_jitter_s=data.draw(st.sampled_from([0.0, 0.003, 0.05])),
            seed=data.draw(st.integers(0, 9)),
            deaths=deaths,
        )
        assert set(run.finish_s) == {request.request_id for request in requests}

    check()


@every_policy
def test_degrees_that_no_longer_fit_are_dropped_and_come_back_with_the_ranks(
    spec, drive, make, request_of, flux, death
):
    requests = [
        request_of(1024, request_id=name, arrival_s=arrival_s, deadline_s=arrival_s + 3.0)
        for name, arrival_s in (("before", 0.0), ("fewer", 100.0), ("after", 200.0))
    ]
    deaths = [death(50.0, rank, 150.0) for rank in (0, 2, 3, 5, 6)]
    run = drive(make(spec, flux), requests, flux, deaths=deaths)
    widest = {request_id: max(task.degree for task in run.denoise(request_id)) for request_id in run.finish_s}
    assert widest["fewer"] <= 2, "three ranks live: 1, 4 and 7"
    assert {rank for task in run.denoise("fewer") for rank in task.ranks} <= {1, 4, 7}
    assert widest["after"] == widest["before"]


@every_policy
def test_with_no_rank_alive_everyone_waits(spec, drive, make, request_of, flux, death):
    requests = [request_of(height, request_id=f"r{height}", deadline_s=3.0) for height in (256, 1024)]
    deaths = [death(0.2, rank, 30.0 + rank) for rank in range(8)]
    run = drive(make(spec, flux), requests, flux, deaths=deaths)
    assert len(run.finish_s) == 2
    assert not [start_s for start_s, _, _ in run.tasks if 0.2 < start_s < 30.0]


@every_policy
@pytest.mark.parametrize("height", [256, 2048])
@pytest.mark.parametrize("deadline_s", [-1.0, 6.0, 1e5])
def test_a_lone_request_completes(spec, height, deadline_s, drive, make, request_of, flux):
    run = drive(make(spec, flux), [request_of(height, arrival_s=0.3, deadline_s=deadline_s)], flux)
    assert len(run.finish_s) == 1


@every_policy
def test_all_late_under_heavy_overload_complete(spec, drive, make, request_of, flux):
    requests = [
        request_of((256, 512, 1024, 2048)[index % 4], request_id=f"r{index}", arrival_s=0.01 * index, deadline_s=-1.0)
        for index in range(60)
    ]
    run = drive(make(spec, flux), requests, flux, jitter=0.01, is_pure_checked=False)
    assert len(run.finish_s) == 60


@every_policy
def test_overload_with_deadlines_completes(spec, drive, make, poisson, flux):
    requests = poisson(240, 60, seed=3)
    run = drive(make(spec, flux), requests, flux, jitter=0.02, timer_jitter_s=0.003)
    assert len(run.finish_s) == 60


@st.composite
def limits(draw: st.DrawFn, num_ranks: int) -> StageRanks:
    """Encoders on the first ranks, ranks of their own for each stage, ranks of their own for each model, some of which
    encode, or any sets that overlap; every stage of every model has a rank."""
    ranks = list(range(num_ranks))
    first = draw(st.integers(1, num_ranks - 1))
    some = st.lists(st.sampled_from(ranks), min_size=1, unique=True)
    encoders = {("", ENCODE): ranks[:first]}
    set_aside = {("", ENCODE): ranks[:1], ("", DECODE): ranks[:first], ("", DENOISE): ranks[first:]}
    by_model = {("a", ""): ranks[:first], ("b", ""): ranks[first:]}
    by_both = {**by_model, ("a", ENCODE): ranks[:1], ("b", DECODE): ranks[-1:]}
    any_stage = st.tuples(st.sampled_from(["", "a", "b"]), st.sampled_from(["", ENCODE, DENOISE, DECODE]))
    found = draw(
        st.one_of(*map(st.just, (encoders, set_aside, by_model, by_both)), st.dictionaries(any_stage, some, max_size=4))
    )
    assume(all(StageRanks.of(found).roles))
    return StageRanks.of(found)


@every_policy
def test_stages_run_on_the_ranks_that_may_run_them_and_every_request_completes(
    spec, drive, make, request_of, table_cost, death
):
    @quick
    @given(data=st.data())
    def check(data):
        num_ranks = data.draw(st.sampled_from([2, 3, 4, 8]))
        decode = data.draw(decode_tables())
        team_s = data.draw(st.sampled_from([0.0, 0.5]))
        cost = table_cost(data.draw(step_tables()), decode, encode=data.draw(seconds), team_s=team_s)
        requests = data.draw(workloads(request_of, models=("a", "b", "c")))
        times = st.floats(0.0, 4.0)
        deaths = [
            death(at := data.draw(times), rank, at + data.draw(times))
            for rank in data.draw(st.lists(st.integers(0, num_ranks - 1), max_size=2, unique=True))
        ]
        run = drive(
            make(spec, cost, num_ranks), requests, cost, num_ranks=num_ranks, deaths=deaths,
            jitter=data.draw(st.sampled_from([0.0, 0.1])), stage_ranks=data.draw(limits(num_ranks)),
        )  # fmt: skip
        assert set(run.finish_s) == {request.request_id for request in requests}

    check()


@every_policy
def test_no_task_spans_nodes_and_every_request_completes(spec, drive, make, request_of, table_cost, death):
    """On any profile, with dying ranks and with limits: `drive` asserts at every plan that ranks share a node."""

    @quick
    @given(data=st.data())
    def check(data):
        per_node = data.draw(st.sampled_from([2, 3, 4]))
        num_ranks = per_node * data.draw(st.integers(2, 3))
        steps = data.draw(step_tables())
        steps = {h: {k: s for k, s in times.items() if k <= per_node} for h, times in steps.items()}
        decode = {
            h: {k: s for k, s in times.items() if k <= per_node} for h, times in data.draw(decode_tables()).items()
        }
        team_s = data.draw(st.sampled_from([0.0, 0.5]))
        cost = table_cost(steps, decode, encode=data.draw(seconds), team_s=team_s)
        requests = data.draw(workloads(request_of, models=("a", "b", "c")))
        times = st.floats(0.0, 4.0)
        deaths = [
            death(at := data.draw(times), rank, at + data.draw(times))
            for rank in data.draw(st.lists(st.integers(0, num_ranks - 1), max_size=3, unique=True))
        ]
        allowed = data.draw(st.one_of(st.just(StageRanks()), limits(num_ranks)))
        run = drive(
            make(spec, cost, num_ranks), requests, cost, num_ranks=num_ranks, deaths=deaths,
            jitter=data.draw(st.sampled_from([0.0, 0.1])), stage_ranks=allowed, nodes=Nodes(per_node),
        )  # fmt: skip
        assert set(run.finish_s) == {request.request_id for request in requests}

    check()


@every_policy
def test_a_wide_request_does_not_starve_while_free_ranks_are_scattered(spec, drive, make, request_of, table_cost):
    """It runs on four ranks or not at all, while narrow requests arrive: hardly later than on one node. `sjf` and
    `srtf` serve it last on either."""
    if spec == "exhaustive:nodes=100" or spec.startswith("fixed"):
        return  # one would take minutes, the others have no degree of 4
    cost = table_cost({256: {1: 0.05, 2: 0.04}, 1024: {4: 0.1}}, {256: 0.01, 1024: 0.05})
    requests = [
        request_of(256, request_id=f"narrow{index}", arrival_s=0.11 * index, deadline_s=0.11 * index + 5, num_steps=8)
        for index in range(300)
    ]
    requests.append(replace(request_of(1024, request_id="wide", arrival_s=3.01, deadline_s=12.0), degrees=(4,)))
    requests.sort(key=lambda request: request.arrival_s)
    whole, divided = (
        drive(make(spec, cost, 8), requests, cost, nodes=nodes, jitter=0.02, is_pure_checked=False)
        for nodes in (ONE_NODE, Nodes(4))
    )
    assert divided.finish_s["wide"] < whole.finish_s["wide"] + 5.0


@every_policy
def test_while_no_rank_may_encode_those_that_are_encoded_go_on_and_the_others_wait(
    spec, drive, make, request_of, flux, death
):
    requests = [request_of(1024, request_id="encoded"), request_of(256, request_id="new", arrival_s=1.0)]
    run = drive(
        make(spec, flux), requests, flux, deaths=[death(0.3, 0, 60.0)], stage_ranks=StageRanks.of({("", ENCODE): [0]})
    )
    assert run.finish_s["encoded"] < 10
    assert [start_s for start_s, _, task in run.tasks if task.stage == ENCODE] == [0.0, 60.0]


@every_policy
def test_an_encode_gets_the_one_rank_for_it_while_others_are_idle_too(spec, drive, make, request_of, flux):
    """Also where a task of another request would have taken it: the others do as well for that."""
    if spec == "fcfs":
        return  # one request at a time
    requests = [request_of(256, request_id="first"), request_of(256, request_id="second")]
    run = drive(make(spec, flux, 8), requests, flux, stage_ranks=StageRanks.of({("", ENCODE): [3]}))
    encodes = {task.members[0]: start_s for start_s, _, task in run.tasks if task.stage == ENCODE}
    assert sorted(encodes.values()) == [0.0, pytest.approx(0.021)]


@every_policy
def test_nothing_to_do_asks_for_no_timer(spec, make, flux):
    assert make(spec, flux).plan(State((), (), tuple(range(8)), flux), 12.3) == Plan()
