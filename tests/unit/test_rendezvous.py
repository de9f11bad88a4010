"""Members of a group meet, or learn at once that it is not to be."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tetriserve.worker.rendezvous import PeerAbsent, close_rendezvous, meet, open_rendezvous


@pytest.fixture
def group(tmp_path: Path) -> Path:
    open_rendezvous(tmp_path / "group-1-0-2")
    return tmp_path / "group-1-0-2"


def test_all_members_meet(group: Path) -> None:
    other = threading.Thread(target=meet, args=(group, 2, (0, 2), 10.0))
    other.start()
    meet(group, 0, (0, 2), 10.0)
    other.join(10.0)
    assert not other.is_alive()


def test_whoever_waits_for_a_dead_peer_is_sent_away_when_the_group_is_dropped(group: Path) -> None:
    threading.Timer(0.05, close_rendezvous, (group,)).start()
    start = time.monotonic()
    with pytest.raises(PeerAbsent, match="the group was dropped"):
        meet(group, 0, (0, 2), 60.0)
    assert time.monotonic() - start < 30
    assert list(group.parent.iterdir()) == []


def test_whoever_comes_after_the_group_was_dropped_is_sent_away(group: Path) -> None:
    close_rendezvous(group)
    close_rendezvous(group)  # once more is no error
    with pytest.raises(PeerAbsent, match="the group was dropped"):
        meet(group, 0, (0, 2), 60.0)


def test_a_peer_that_does_not_come_is_named(group: Path) -> None:
    with pytest.raises(PeerAbsent, match=r"peer 2 did not come within 0.01 s"):
        meet(group, 0, (0, 2), 0.01)
