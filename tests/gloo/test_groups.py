"""Forming groups, with members that are slow or do not come."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.waiting import HANG_S
from tetriserve.worker import groups
from tetriserve.worker.groups import Groups
from tetriserve.worker.rendezvous import PeerAbsent, Rendezvous

CONNECTING_S, LATE_S, DROPPED_AFTER_S = 2.0, 3.0, 0.1
ENDLESS_S = 10 * HANG_S
RANKS = (0, 1)
DEAF = [f"deaf {number}" for number in range(12)]
"""Which of two members waits for the other to connect is chance: the first group will do in which it is rank 0."""


def test_connecting_is_given_little_time_and_collectives_as_much_as_wanted(tmp_path: Path) -> None:
    """Were one of the waits not ended, it would take `ENDLESS_S`."""
    for name in ("slow", "half", "dropped", *DEAF):
        Rendezvous(tmp_path / name).open()
    context = multiprocessing.get_context("spawn")
    ends, processes = [], []
    for rank in RANKS:
        ours, theirs = context.Pipe()
        process = context.Process(target=_member, args=(rank, tmp_path, theirs))
        process.start()
        ends.append(ours)
        processes.append(process)
    try:
        assert ends[0].poll(HANG_S)
        ends[1].send(ends[0].recv())
        assert all(end.poll(HANG_S) for end in ends)
        (waited_s, absent_s, deaf_s), _ = (end.recv() for end in ends)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert waited_s >= LATE_S, "the late member was waited for, longer than connecting may take"
    assert absent_s > CONNECTING_S / 2, "whose peer leaves no address is released after the time for connecting"
    assert deaf_s > CONNECTING_S / 2, "and so is whose peer left its address, and died"


def _member(rank: int, rendezvous: Path, theirs: Connection) -> None:
    groups._MEETING_TIMEOUT_S = HANG_S
    formed = Groups(rank, "gloo", "cpu", rendezvous, timeout_s=ENDLESS_S)
    groups._CONNECTING_TIMEOUT = timedelta(seconds=CONNECTING_S)
    process_group = formed.get("slow", RANKS).process_group
    start = time.monotonic()
    if rank == 0:
        theirs.send("waits from now on")
    else:
        theirs.recv()
        time.sleep(LATE_S)
    ones = torch.ones(2)
    dist.all_to_all_single(torch.empty_like(ones), ones, group=process_group)
    waited_s = time.monotonic() - start
    absent_s = _seconds_without_peer(formed, rendezvous, rank, "half")
    deaf_s = _seconds_with_deaf_peer(formed, rank)
    if rank == 0:  # which is released by the drop, long before the end of the time for connecting
        groups._CONNECTING_TIMEOUT = timedelta(seconds=ENDLESS_S)
        threading.Timer(DROPPED_AFTER_S, Rendezvous(rendezvous / "dropped").close).start()
    _seconds_without_peer(formed, rendezvous, rank, "dropped")
    theirs.send((waited_s, absent_s, deaf_s))
    theirs.recv()  # a peer that ends would release the other


def _seconds_without_peer(formed: Groups, rendezvous: Path, rank: int, group: str) -> float:
    """How long rank 0 waits for rank 1, which meets it and goes no further."""
    start = time.monotonic()
    if rank == 1:
        with contextlib.suppress(PeerAbsent):  # on a busy core it may see that rank 0 has come only after the drop
            Rendezvous(rendezvous / group).meet(1, RANKS, HANG_S)
    else:
        with pytest.raises(PeerAbsent):
            formed.get(group, RANKS)
    return time.monotonic() - start


def _seconds_with_deaf_peer(formed: Groups, rank: int) -> float:
    """How long rank 0 waits for rank 1, which leaves its address and never looks for that of rank 0."""
    if rank == 1:
        groups._MeetingStore.get = lambda store, key: time.sleep(ENDLESS_S)  # type: ignore[method-assign, return-value]
        for group in DEAF:
            threading.Thread(target=formed.get, args=(group, RANKS), daemon=True).start()
        return 0.0
    for group in DEAF:
        start = time.monotonic()
        try:
            formed.get(group, RANKS)
        except PeerAbsent:
            return time.monotonic() - start
    return 0.0
