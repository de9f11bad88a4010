"""Functions that pause: they go on, end, fail, and are released, and nothing of them stays."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tetriserve.models.generic.threads import PausingThread, Released

CPU = torch.device("cpu")
NAME = "a test's function"
Pause = Callable[[], None]


@pytest.fixture(autouse=True)
def no_garbage() -> Iterator[None]:
    """What is left is found without the collector of cycles."""
    gc.disable()
    yield
    assert not any(thread.name == NAME for thread in threading.enumerate())
    gc.enable()


def test_it_pauses_and_returns() -> None:
    seen = []

    def body(pause: Pause) -> str:
        for number in range(3):
            seen.append(number)
            pause()
        return "result"

    thread = PausingThread(body, CPU, NAME)
    assert seen == []
    for number in range(3):
        thread.go_on()
        assert seen == list(range(number + 1)) and not thread.has_ended
    thread.go_on()
    assert thread.has_ended and thread.result == "result"
    thread.release()


def test_an_error_is_raised_where_the_owner_waits_and_keeps_nothing() -> None:
    refs: list[weakref.ref[torch.Tensor]] = []

    def body(pause: Pause) -> None:
        tensor = torch.zeros(1)
        refs.append(weakref.ref(tensor))
        pause()
        raise ZeroDivisionError("of the function")

    thread = PausingThread(body, CPU, NAME)
    thread.go_on()
    assert refs[0]() is not None
    with pytest.raises(ZeroDivisionError, match="of the function") as caught:
        thread.go_on()
    assert thread.has_ended
    del caught
    assert refs[0]() is None
    thread.release()


@pytest.mark.parametrize("goes_on", [0, 1, 2])
def test_its_thread_and_tensors_end_with_it(goes_on: int) -> None:
    refs: list[weakref.ref[torch.Tensor]] = []
    errors: list[type[BaseException]] = []

    def body(pause: Pause) -> None:
        tensor = torch.zeros(1)
        refs.append(weakref.ref(tensor))
        try:
            while True:
                pause()
        except BaseException as error:
            errors.append(type(error))
            raise

    thread = PausingThread(body, CPU, NAME)
    for _ in range(goes_on):
        thread.go_on()
    del thread
    assert errors == [Released] * bool(goes_on)
    assert all(ref() is None for ref in refs)


def test_a_function_that_handles_everything_is_released_all_the_same() -> None:
    num_pauses = 0

    def body(pause: Pause) -> None:
        nonlocal num_pauses
        for _ in range(5):
            try:
                num_pauses += 1
                pause()
            except BaseException:  # noqa: S112  what is tested
                continue

    thread = PausingThread(body, CPU, NAME)
    thread.go_on()
    thread.release()
    assert num_pauses == 5


def test_it_computes_as_its_owner_does() -> None:
    found: dict[str, Any] = {}

    def body(pause: Pause) -> None:
        found.update(threads=torch.get_num_threads(), grad=torch.is_grad_enabled())
        for _ in range(100):
            torch.ones(64, 64) @ torch.ones(64, 64)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        thread = PausingThread(body, CPU, NAME)
        thread.go_on()
    finally:
        torch.set_num_threads(before)
    assert found == {"threads": 3, "grad": False}
    assert thread.cpu_s > 0
    thread.release()
