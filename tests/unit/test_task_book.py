"""Ended tasks: what they took, beside what was expected when they started."""

from __future__ import annotations

from dataclasses import replace

from tetriserve.core.events import (
    FailureKind,
    Result,
    Run,
    StartTask,
    TaskFailed,
    TaskFinished,
    TensorRef,
    TextCount,
    Work,
)
from tetriserve.core.execution import Execution
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, image_stages
from tetriserve.engine.tasks import EndedTask, TaskBook
from tetriserve.profile import Profile, ProfileCost, Row

COST = ProfileCost(
    Profile(
        model="tiny",
        hardware="h",
        execution=Execution("float32"),
        source="s",
        created="c",
        switch_s=0.001,
        rows=(
            Row(stage=ENCODE, seconds=0.01),
            Row(stage=DENOISE, height=256, width=256, tokens=64, degree=1, seconds=0.25),
            Row(stage=DECODE, height=256, width=256, seconds=0.01),
        ),
    )
)
REQUEST = Request(
    request_id="a", prompt="", shape=Shape(256, 256), stages=image_stages(4), seed=0, arrival_s=0.0, deadline_s=9.0
)
ENCODING, DECODING = Task(("a",), ENCODE, (0,)), Task(("a",), DECODE, (0,))
DENOISING = Task(("a",), DENOISE, (0,), 4)
REF = TensorRef("a", 1)
SHORT, LONG = Result(REF, 0, is_stage_over=True), Result(REF, 4, is_stage_over=True)


def start(task_id: int, task: Task, stage_index: int) -> StartTask:
    return StartTask(task_id, task, (Work(REQUEST, stage_index, 0, {}),))


def test_step_times_are_the_leaders_beside_those_believed_at_the_start() -> None:
    book = TaskBook()
    book.start(start(1, DENOISING, 1), 1.0, COST)
    book.start(start(2, DECODING, 2), 1.5, COST)
    assert book.end(TaskFinished(1, 2.0, (LONG,)), 3.5) == EndedTask(
        work=(Work(REQUEST, 1, 0, {}),),
        run=Run(DENOISING, 1.0, 3.5),
        results=(LONG,),
        failure=None,
        step_s=0.5,
        expected_step_s=0.25,
    )
    book.start(start(3, ENCODING, 0), 3.6, COST)
    read = replace(SHORT, text=TextCount(5, is_truncated=False))
    ended = book.end(TaskFinished(3, 0.1, (read,)), 3.7)
    assert (ended.run, ended.results) == (Run(ENCODING, 3.6, 3.7), (read,))
    assert book.end(TaskFinished(2, 0.1, (SHORT,)), 3.75) == EndedTask(
        work=(Work(REQUEST, 2, 0, {}),),
        run=Run(DECODING, 1.5, 3.75),
        results=(SHORT,),
        failure=None,
        step_s=None,
        expected_step_s=None,
    )


def test_a_task_that_ended_early_has_the_step_time_of_the_steps_it_did() -> None:
    book = TaskBook()
    book.start(start(1, DENOISING, 1), 1.0, COST)
    ended = book.end(TaskFinished(1, 1.0, (replace(LONG, num_steps=2),)), 2.5)
    assert (ended.step_s, ended.expected_step_s) == (0.5, 0.25)


def test_a_task_without_a_result_has_no_step_time() -> None:
    book = TaskBook()
    book.start(start(1, DENOISING, 1), 1.0, COST)
    ended = book.end(TaskFailed(1, FailureKind.LOST, "rank 0 is gone"), 2.0)
    assert (ended.failure, ended.results) == (FailureKind.LOST, ())
    assert (ended.step_s, ended.expected_step_s) == (None, 0.25)
