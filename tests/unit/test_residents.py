"""What a rank keeps of requests: by kind of stage, under the store's key, and within a number of bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tetriserve.worker.residents import Residents


def tensors(*sizes: int) -> dict[str, Any]:
    return {f"t{number}": SimpleNamespace(nbytes=num_bytes) for number, num_bytes in enumerate(sizes)}


def filled(max_bytes: int, **num_bytes: int) -> Residents:
    """Requests of so many bytes each, used in this order."""
    residents = Residents(max_bytes)
    for name, size in num_bytes.items():
        residents.of(name).hold("encode", f"{name}.encode.0.0", tensors(size))
    return residents


def held(residents: Residents) -> list[str]:
    return [name for name in "abcd" if name in residents]


def test_a_state_is_held_under_its_key_and_a_newer_one_of_its_stage_takes_its_place() -> None:
    resident = Residents(100).of("a")
    assert (resident.key("denoise"), resident.tensors, resident.num_bytes) == (None, {}, 0)
    embeds, first, second = tensors(3, 4), tensors(5), tensors(6)
    resident.hold("encode", "a.encode.0.0", embeds)
    resident.hold("denoise", "a.denoise.2.1", first)
    before = resident.tensors
    resident.hold("denoise", "a.denoise.4.2", second)
    assert (resident.key("encode"), resident.key("denoise")) == ("a.encode.0.0", "a.denoise.4.2")
    assert resident.tensors == {"encode": embeds, "denoise": second}
    assert resident.num_bytes == 13
    assert before == {"encode": embeds, "denoise": first}, "what a task was given stays as it was"


def test_a_request_is_the_same_resident_until_it_is_forgotten() -> None:
    residents = Residents(100)
    residents.of("a").memo["loop"] = 7
    assert residents.of("a").memo == {"loop": 7}
    residents.forget("a")
    residents.forget("a")
    assert "a" not in residents
    assert residents.of("a").memo == {}


def test_within_the_limit_nothing_goes() -> None:
    residents = filled(30, a=10, b=10, c=10)
    residents.evict(keep=[])
    assert held(residents) == ["a", "b", "c"]


def test_above_it_those_go_that_were_used_least_recently_until_the_rest_is_within() -> None:
    residents = filled(25, a=10, b=10, c=10, d=10)
    residents.of("a")
    residents.evict(keep=[])
    assert held(residents) == ["a", "d"]


@pytest.mark.parametrize("max_bytes", [0, 15])
def test_members_of_the_last_task_stay_whatever_they_take(max_bytes: int) -> None:
    residents = filled(max_bytes, a=10, b=10, c=10)
    residents.evict(keep=("a", "c"))
    assert held(residents) == ["a", "c"]
    residents.evict(keep=())
    assert held(residents) == (["c"] if max_bytes else [])


def test_one_that_was_evicted_comes_back_empty() -> None:
    residents = filled(10, a=10, b=10)
    residents.of("a").memo["loop"] = 7
    residents.of("b")
    residents.evict(keep=["b"])
    again = residents.of("a")
    assert (again.key("encode"), again.tensors, again.memo) == (None, {}, {})
