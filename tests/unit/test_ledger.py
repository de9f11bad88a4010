"""How a task ends, by what its members say in any order, and by who is lost."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest

from tetriserve.core.events import FailureKind, Result, StartTask, TaskFailed, TaskFinished, TensorRef, Work
from tetriserve.core.messages import TaskDone, TaskError
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DENOISE, image_stages
from tetriserve.executor.ledger import Ledger

REQUEST = Request(
    request_id="a",
    prompt="",
    shape=Shape(256, 256),
    stages=image_stages(4),
    seed=0,
    arrival_s=0.0,
    deadline_s=9.0,
)
START = StartTask(1, Task(("a",), DENOISE, (2, 0), 4), (Work(REQUEST, 1, 0, {}),))
RESULT = Result(TensorRef("a.denoise.4.1", 1), 4, is_stage_over=True)
LEADS = TaskDone(1, 0.5, (RESULT,), 0.45)
FOLLOWS = TaskDone(1, 0.4)


def error(kind: FailureKind, failed_at: float, text: str = "denoise failed") -> TaskError:
    return TaskError(1, kind, text, failed_at)


@pytest.mark.parametrize("order", [*permutations([(2, LEADS), (0, FOLLOWS)])])
def test_a_task_ends_once_with_what_its_leader_left(order: tuple[tuple[int, TaskDone], ...]) -> None:
    ledger = Ledger()
    running = ledger.open(START, 7)
    assert (ledger.busy_ranks, running.token) == ({0, 2}, 7)
    for rank, answer in order:
        assert ledger.close(running) is None
        running.answer(rank, answer)
    assert ledger.close(running) == TaskFinished(1, 0.5, (RESULT,), 0.45)
    assert ledger.close(running) is None
    assert (ledger.find(1), ledger.busy_ranks) == (None, set())


@pytest.mark.parametrize("num_steps", [-1, 5])
def test_a_leader_that_claims_other_steps_than_it_was_to_do_has_not_answered(num_steps: int) -> None:
    running = Ledger().open(START, 7)
    with pytest.raises(ValueError, match=f"it did {num_steps} of 4 steps"):
        running.answer(2, TaskDone(1, 0.5, (replace(RESULT, num_steps=num_steps),)))


@pytest.mark.parametrize("results", [(), (RESULT, RESULT)])
def test_a_leader_with_another_number_of_results_than_requests_has_not_answered(results: tuple[Result, ...]) -> None:
    ledger = Ledger()
    running = ledger.open(START, 7)
    running.answer(0, FOLLOWS)
    with pytest.raises(ValueError, match=f"{len(results)} results for 1 requests"):
        running.answer(2, TaskDone(1, 0.5, results))
    assert (ledger.close(running), ledger.busy_ranks) == (None, {2})


def test_of_several_errors_the_earliest_is_the_cause() -> None:
    running = Ledger().open(START, 7)
    running.answer(2, error(FailureKind.LOST, 2.0, "peer gone"))
    running.answer(0, error(FailureKind.STEP, 1.0, "not finite"))
    assert running.end == TaskFailed(1, FailureKind.STEP, "not finite")


def test_a_lost_member_explains_the_errors_of_the_others() -> None:
    ledger = Ledger()
    running = ledger.open(START, 7)
    running.answer(2, error(FailureKind.STEP, 1.0))
    assert ledger.waiting_for(0) == [running]
    assert ledger.waiting_for(2) == []
    running.lose(0, "rank 0 was lost: killed")
    assert ledger.close(running) == TaskFailed(1, FailureKind.LOST, "rank 0 was lost: killed")


def test_one_that_was_ended_for_being_stuck_after_an_error_is_no_cause() -> None:
    running = Ledger().open(START, 7)
    running.answer(2, error(FailureKind.STEP, 1.0))
    running.lose(0, "rank 0 was lost: stuck", is_victim=True)
    assert running.end == TaskFailed(1, FailureKind.STEP, "denoise failed")
    alone = Ledger().open(START, 7)
    alone.lose(0, "rank 0 was lost: stuck", is_victim=True)
    assert alone.end == TaskFailed(1, FailureKind.LOST, "rank 0 was lost: stuck")


def test_a_member_out_of_memory_is_pending_until_its_worker_has_ended() -> None:
    ledger = Ledger()
    running = ledger.open(START, 7)
    running.answer(0, FOLLOWS)
    running.answer(2, error(FailureKind.MEMORY, 1.0))
    assert (ledger.close(running), ledger.busy_ranks) == (None, {2})
    running.lose(2, "rank 2 was lost: ran out of memory", is_victim=True)
    end = TaskFailed(1, FailureKind.MEMORY, "a rank ran out of memory: denoise failed")
    assert ledger.close(running) == end
