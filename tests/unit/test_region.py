"""The memory that a pool shares: what its words mean, how it reaches a process, and what happens where it is scarce."""

from __future__ import annotations

import multiprocessing
import resource
from multiprocessing.connection import Connection

import pytest

from tests.waiting import HANG_S
from tetriserve.core.errors import ConfigError
from tetriserve.worker.team.region import Region, mark, token_of

NUM_RANKS, SLOT_BYTES = 3, 4096


def test_words_and_slots_do_not_overlap() -> None:
    region = Region(NUM_RANKS, SLOT_BYTES)
    words = [
        word
        for rank in range(NUM_RANKS)
        for word in (region.aborted(rank), region.progress(rank), region.dropped(rank))
    ]
    assert len({8 * word // 64 for word in words}) == len(words), "each has a cache line of its own"
    slots = sorted(region.slot(rank, parity) for rank in range(NUM_RANKS) for parity in (0, 1))
    assert 8 * max(words) + 8 <= slots[0]
    assert all(after - before >= SLOT_BYTES for before, after in zip(slots, slots[1:], strict=False))
    assert slots[-1] + SLOT_BYTES == region.num_bytes
    region.close()
    region.close()


def test_marks_grow_within_a_task_and_from_task_to_task() -> None:
    marks = [mark(1, 1), mark(1, 2), mark(1, 2**24 - 1), mark(2, 1), mark(2**39, 1)]
    assert marks == sorted(set(marks))
    assert [token_of(each) for each in marks] == [1, 1, 1, 2, 2**39]


def test_aborting_an_earlier_task_takes_nothing_back() -> None:
    region = Region(NUM_RANKS, 0)
    region.abort((0, 2), 7)
    region.abort((0, 1), 3)
    assert [region.words[region.aborted(rank)] for rank in range(NUM_RANKS)] == [7, 3, 7]
    region.close()


def _abort_rank_1(region: Region, end: Connection) -> None:
    region.abort((1,), region.words[region.progress(0)])
    end.send("done")


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_that_is_given_it_writes_to_the_same_words(method: str) -> None:
    region = Region(NUM_RANKS, SLOT_BYTES)
    region.words[region.progress(0)] = 2**63
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=_abort_rank_1, args=(region, theirs))  # type: ignore[attr-defined]
    process.start()
    assert ours.poll(HANG_S)
    process.join(HANG_S)
    assert region.words[region.aborted(1)] == 2**63
    region.close()


def test_too_little_memory_is_told_with_what_is_needed() -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(ConfigError) as caught:
            Region(8, 2**20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value) == (
        "8 ranks need 16 MiB of shared memory for their exchanges: File too large; use fewer --ranks"
    )
