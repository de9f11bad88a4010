"""What is derived from a request's history, with numbers."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tetriserve.core.events import Run
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, image_stages
from tetriserve.workload.outcome import Outcome, Status

REQUEST = Request(
    request_id="r",
    prompt="a secret",
    shape=Shape(256, 512),
    stages=image_stages(5),
    seed=9,
    arrival_s=10.0,
    deadline_s=20.0,
    priority=2,
)
OUTCOME = Outcome(
    request=REQUEST,
    status=Status.FINISHED,
    runs=(
        Run(Task(("r",), ENCODE, (3,)), 11.0, 11.5),
        Run(Task(("r",), DENOISE, (0, 1), 2), 12.0, 14.0),
        Run(Task(("r",), DENOISE, (0, 1, 2, 3), 3), 14.0, 15.0),
        Run(Task(("r",), DECODE, (2,)), 16.0, 17.0),
    ),
    predicted_finish_s=16.5,
    finish_s=17.25,
)


def test_a_request_waits_for_as_long_as_no_task_of_it_runs() -> None:
    assert OUTCOME.latency_s == pytest.approx(7.25)
    assert OUTCOME.queued_s == pytest.approx(1.0 + 0.5 + 0.0 + 1.0 + 0.25)


def test_gpu_time_weighs_each_task_by_its_degree() -> None:
    assert OUTCOME.gpu_time_s == pytest.approx(0.5 + 2 * 2.0 + 4 * 1.0 + 1.0)


def test_degrees_and_ranks_have_one_entry_per_denoise_step() -> None:
    assert OUTCOME.degrees == (2, 2, 4, 4, 4)
    assert OUTCOME.ranks == ((0, 1), (0, 1), (0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("status", "finish_s", "is_attained"),
    [
        (Status.FINISHED, 20.0, True),
        (Status.FINISHED, 20.001, False),
        (Status.FAILED, 12.0, False),
        (Status.CANCELLED, 12.0, False),
    ],
)
def test_attained_means_finished_by_the_deadline(status: Status, finish_s: float, is_attained: bool) -> None:
    assert dataclasses.replace(OUTCOME, status=status, finish_s=finish_s).is_attained is is_attained


def test_a_result_line_holds_what_happened_and_no_prompt() -> None:
    line = json.dumps(OUTCOME.as_json())
    assert "secret" not in line
    values = json.loads(line)
    assert (values["status"], values["attained"], values["height"], values["width"]) == ("finished", True, 256, 512)
    assert values["degrees"] == [2, 2, 4, 4, 4]
    assert values["ranks"][0] == [0, 1]
    assert (values["queued_s"], values["gpu_time_s"], values["latency_s"]) == (2.75, 9.5, 7.25)


def test_a_request_that_never_ran_has_waited_all_the_time() -> None:
    idle = dataclasses.replace(OUTCOME, runs=(), status=Status.CANCELLED)
    assert (idle.queued_s, idle.gpu_time_s, idle.degrees, idle.ranks) == (7.25, 0, (), ())
