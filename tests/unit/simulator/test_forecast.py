"""A forecast is what the simulator would do from here on, whatever has happened before."""

from __future__ import annotations

import dataclasses
import itertools
import statistics

import pytest

from tetriserve.control import Controller
from tetriserve.control.whatif import forecast
from tetriserve.core.events import Cancelled, Submitted, WorkerJoined
from tetriserve.core.forecast import Forecast
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.policies import make_policy
from tetriserve.simulator import Simulation

POLICIES = ["tetriserve", "lookahead", "fixed:2", "fcfs", "rssp", "sjf", "srtf", "edf", "edf-best-fit"]
every_policy = pytest.mark.parametrize("spec", POLICIES)
NUM_RANKS = 8


@pytest.fixture(scope="module")
def new_policy(flux):
    return lambda spec: make_policy(spec, flux, num_ranks=NUM_RANKS, shapes=flux.profile.shapes)


@pytest.fixture(scope="module")
def controller_of(flux, new_policy):
    """A controller with these requests, submitted at 0."""

    def build(spec, requests, *, num_ranks=NUM_RANKS):
        controller = Controller(new_policy(spec), flux)
        for rank in range(num_ranks):
            controller.handle(WorkerJoined(rank), 0.0)
        for request in requests:
            controller.handle(Submitted(request), 0.0)
        return controller

    return build


@pytest.fixture(scope="module")
def queue_of(workload):
    """Requests of all sizes that came at once."""

    def build(count, **options):
        requests = workload(count=count, **options)
        return [
            dataclasses.replace(request, arrival_s=0.0, deadline_s=request.deadline_s - request.arrival_s)
            for request in requests
        ]

    return build


def check_runs(future: Forecast, num_steps: dict[str, int]) -> None:
    """No rank runs two tasks at a time, no request has two, and every step is there once."""
    by_rank, by_request = {}, {}
    for run in future.runs:
        by_request.setdefault(run.task.members[0], []).append(run)
        for rank in run.task.ranks:
            by_rank.setdefault(rank, []).append(run)
    for runs in itertools.chain(by_rank.values(), by_request.values()):
        runs.sort(key=lambda run: run.start_s)
        for before, after in itertools.pairwise(runs):
            assert before.end_s <= after.start_s + 1e-9
    for name, total in num_steps.items():
        assert sum(run.task.num_steps for run in by_request[name]) == total
        assert by_request[name][-1].task.stage == DECODE
        assert by_request[name][-1].end_s == pytest.approx(future.finish_s[name])


@every_policy
def test_from_the_middle_of_a_run_it_says_what_then_happens(spec, flux, new_policy, workload):
    requests = workload(count=25, rate=60)
    simulation = Simulation(new_policy(spec), flux, num_ranks=NUM_RANKS)
    forecasts = []

    def arrivals():
        yield from requests
        forecasts.append(forecast(simulation.controller, simulation.now, new_policy(spec)))

    outcomes = list(simulation.run(arrivals()))
    (future,) = forecasts
    last_s = requests[-1].arrival_s
    late = {outcome.request.request_id: outcome.finish_s for outcome in outcomes if outcome.finish_s > last_s}
    assert len(late) > 3
    assert future.now == last_s
    assert future.finish_s == pytest.approx(late)
    ran = {run for outcome in outcomes for run in outcome.runs if run.end_s > last_s}
    assert {(run.task, round(run.end_s, 6)) for run in future.runs} == {(run.task, round(run.end_s, 6)) for run in ran}


@every_policy
def test_newcomers_are_as_good_as_submitted(spec, controller_of, new_policy, queue_of):
    requests = queue_of(8)
    apart = forecast(controller_of(spec, requests[:5]), 0.0, new_policy(spec), more=requests[5:])
    together = forecast(controller_of(spec, requests), 0.0, new_policy(spec))
    assert apart.finish_s == together.finish_s
    check_runs(apart, {request.request_id: request.num_steps for request in requests})


def test_the_controller_is_left_as_it_is(controller_of, new_policy, queue_of):
    controller = controller_of("tetriserve", queue_of(8))
    before = controller.state
    forecast(controller, 0.0, new_policy("tetriserve"), more=[dataclasses.replace(queue_of(1)[0], request_id="new")])
    assert controller.state == before
    assert before.in_flight


# Not those that give each request whatever is idle: moments that are lumped together find more ranks idle at a time.
@pytest.mark.parametrize("spec", ["tetriserve", "lookahead", "fixed:2", "fcfs", "rssp"])
def test_coarse_it_takes_fewer_tasks_and_says_nearly_the_same(spec, controller_of, new_policy, queue_of):
    requests = queue_of(30, scale=20.0)
    controller = controller_of(spec, requests)
    exact = forecast(controller, 0.0, new_policy(spec))
    coarse = forecast(controller, 0.0, new_policy(spec), resolution=0.2)
    check_runs(coarse, {request.request_id: request.num_steps for request in requests})
    assert len(coarse.runs) < 0.9 * len(exact.runs)
    errors = [abs(coarse.finish_s[name] - finish_s) / finish_s for name, finish_s in exact.finish_s.items()]
    assert statistics.median(errors) < 0.1


def test_coarse_encoding_joins_the_first_denoise_task_and_decoding_follows_the_last(
    flux, controller_of, new_policy, queue_of
):
    requests = queue_of(6, scale=20.0)
    controller = controller_of("fixed:1", requests, num_ranks=1)
    future = forecast(controller, 0.0, new_policy("fixed:1"), resolution=0.5)
    waiting = requests[-1]
    runs = [run for run in future.runs if run.task.members[0] == waiting.request_id]
    first, decode = runs[0], runs[-1]
    assert (first.task.stage, decode.task.stage) == (DENOISE, DECODE)
    work_s = (
        first.task.num_steps * flux.times(waiting, waiting.stage_of(DENOISE))[1]
        + flux.times(waiting, waiting.stage_of(ENCODE))[1]
    )
    assert first.end_s - first.start_s == pytest.approx(work_s + flux.switch_s, abs=flux.move_s + 1e-9)
    assert decode.start_s == pytest.approx(runs[-2].end_s)


@pytest.mark.parametrize(("deadline_s", "degree"), [(30.0, 1), (11.0, 2)])
def test_coarse_a_decode_is_as_wide_as_its_deadline_asks(deadline_s, degree, table_cost, request_of):
    """Ten seconds of steps on all eight ranks, then a decode of 1.2 s on one and 0.8 s on two."""
    cost = table_cost({256: {8: 0.1}}, encode=0.01, decode={1: 1.2, 2: 0.8}, switch_s=1e-4)
    request = request_of(0.0, deadline_s, num_steps=100)
    controller = Controller(make_policy("lookahead", cost, num_ranks=8, shapes=[request.shape]), cost)
    controller.handle_all([WorkerJoined(rank) for rank in range(8)], 0.0)
    controller.handle(Submitted(request), 0.0)
    policy = make_policy("lookahead", cost, num_ranks=8, shapes=[request.shape])
    future = forecast(controller, 0.0, policy, resolution=0.5)
    (decode,) = (run.task for run in future.runs if run.task.stage == DECODE)
    assert decode.degree == degree
    assert future.finish_s["r"] <= deadline_s


def test_the_task_of_a_cancelled_request_keeps_its_ranks_to_its_end(controller_of, new_policy, queue_of):
    leaving, staying = queue_of(2)
    controller = controller_of("fcfs", [leaving, staying])
    controller.handle(Cancelled(leaving.request_id), 0.0)
    future = forecast(controller, 0.0, new_policy("fcfs"))
    assert list(future.finish_s) == [staying.request_id]
    (ended,) = [run.end_s for run in future.runs if run.task.members[0] == leaving.request_id]
    assert min(run.start_s for run in future.runs if run.task.members[0] == staying.request_id) == ended > 0


@every_policy
@pytest.mark.parametrize("resolution", [0.0, 0.5])
def test_without_a_rank_nothing_happens_ever(spec, resolution, controller_of, new_policy, queue_of):
    controller = controller_of(spec, queue_of(3), num_ranks=0)
    future = forecast(controller, 0.0, new_policy(spec), resolution=resolution)
    assert (future.runs, future.finish_s) == ((), {})


def test_it_ends_at_the_time_looked_at(controller_of, new_policy, queue_of):
    controller = controller_of("tetriserve", queue_of(20))
    whole = forecast(controller, 0.0, new_policy("tetriserve"))
    begun = forecast(controller, 0.0, new_policy("tetriserve"), until_s=1.0)
    assert begun.runs == tuple(run for run in whole.runs if run.start_s <= 1.0)
    assert 0 < len(begun.runs) < len(whole.runs)


def test_it_ends_once_what_is_awaited_has_ended_or_is_overdue(controller_of, new_policy, queue_of):
    controller = controller_of("fcfs", queue_of(10))
    whole = forecast(controller, 0.0, new_policy("fcfs"))
    names = list(whole.finish_s)
    third = forecast(controller, 0.0, new_policy("fcfs"), awaited={names[2]: 1e9, names[1]: 1e9})
    assert list(third.finish_s) == names[:3]
    overdue = forecast(controller, 0.0, new_policy("fcfs"), awaited={names[2]: whole.finish_s[names[0]]})
    assert names[0] in overdue.finish_s
    assert names[2] not in overdue.finish_s


def test_degrees_are_told_step_by_step(controller_of, new_policy, queue_of):
    request = queue_of(1)[0]
    future = forecast(controller_of("fixed:2", []), 0.0, new_policy("fixed:2"), more=[request])
    assert future.degrees(request.request_id) == (2,) * request.num_steps
