"""Ended tasks: what they took, beside what was expected when they started."""

from __future__ import annotations

from tetriserve.core.events import FailureKind, Run, StartTask, TaskFailed, TaskFinished, TensorRef, TextCount
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE, image_stages
from tetriserve.engine.tasks import EndedTask, TaskBook
from tetriserve.profile import DecodeRow, DenoiseRow, Profile, ProfileCost

COST = ProfileCost(
    Profile(
        model="tiny", hardware="h", dtype="float32", source="s", created="c", encode_s=0.01, switch_s=0.001,
        denoise=(DenoiseRow(height=256, width=256, tokens=64, degree=1, step_s=0.25),),
        decode=(DecodeRow(height=256, width=256, decode_s=0.01),),
    )
)  # fmt: skip
REQUEST = Request(
    request_id="a", prompt="", shape=Shape(256, 256), stages=image_stages(4), seed=0, arrival_s=0.0, deadline_s=9.0
)
ENCODING, DECODING = Task(("a",), ENCODE, (0,)), Task(("a",), DECODE, (0,))
DENOISING = Task(("a",), DENOISE, (0,), 4)
RESULT = TensorRef("a", 1)


def test_step_times_are_the_leaders_beside_those_believed_at_the_start() -> None:
    book = TaskBook()
    book.start(StartTask(1, DENOISING, REQUEST, 0), 1.0, COST)
    book.start(StartTask(2, DECODING, REQUEST, 4), 1.5, COST)
    assert book.end(TaskFinished(1, 2.0, RESULT), 3.5) == EndedTask(
        request=REQUEST,
        run=Run(DENOISING, 1.0, 3.5),
        steps_done=4,
        failure=None,
        result=RESULT,
        step_s=0.5,
        expected_step_s=0.25,
    )
    book.start(StartTask(3, ENCODING, REQUEST, 0), 3.6, COST)
    text = TextCount(5, is_truncated=False)
    assert book.end(TaskFinished(3, 0.1, RESULT, text), 3.7).run == Run(ENCODING, 3.6, 3.7, text)
    assert book.end(TaskFinished(2, 0.1, RESULT), 3.75) == EndedTask(
        request=REQUEST,
        run=Run(DECODING, 1.5, 3.75),
        steps_done=4,
        failure=None,
        result=RESULT,
        step_s=None,
        expected_step_s=None,
    )


def test_a_task_without_a_result_has_no_step_time() -> None:
    book = TaskBook()
    book.start(StartTask(1, DENOISING, REQUEST, 0), 1.0, COST)
    ended = book.end(TaskFailed(1, FailureKind.LOST, "rank 0 is gone"), 2.0)
    assert (ended.failure, ended.step_s, ended.expected_step_s) == (FailureKind.LOST, None, 0.25)
