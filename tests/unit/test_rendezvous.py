"""Members of a group meet, or learn at once that it is not to be."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.waiting import HANG_S
from tetriserve.worker.rendezvous import PeerAbsent, Rendezvous


@pytest.fixture
def group(tmp_path: Path) -> Rendezvous:
    rendezvous = Rendezvous(tmp_path / "group-1-0-2")
    rendezvous.open()
    return rendezvous


def test_all_members_meet(group: Rendezvous) -> None:
    other = threading.Thread(target=group.meet, args=(2, (0, 2), HANG_S))
    other.start()
    group.meet(0, (0, 2), HANG_S)
    other.join(HANG_S)
    assert not other.is_alive()


def test_what_one_leaves_another_finds_whatever_its_name(group: Rendezvous) -> None:
    group.put("cpu//0/1", b"\x00 address")
    group.put("..", b"two dots")
    group.wait(["cpu//0/1", ".."], HANG_S)
    assert [group.get(name) for name in ("cpu//0/1", "..")] == [b"\x00 address", b"two dots"]
    assert group.has(["cpu//0/1"]) and not group.has(["cpu//0/1", "cpu//0/2"])


def test_whoever_waits_for_a_dead_peer_is_sent_away_when_the_group_is_dropped(
    group: Rendezvous, tmp_path: Path
) -> None:
    closing = threading.Timer(0.05, group.close)
    closing.start()
    with pytest.raises(PeerAbsent, match="the group was dropped"):  # and not because of the time
        group.meet(0, (0, 2), HANG_S)
    closing.join()  # whoever waits is sent away before the files are gone
    assert list(tmp_path.iterdir()) == []


def test_whoever_comes_after_the_group_was_dropped_is_sent_away(group: Rendezvous) -> None:
    group.close()
    group.close()  # once more is no error
    with pytest.raises(PeerAbsent, match="the group was dropped"):
        group.meet(0, (0, 2), 60.0)
    with pytest.raises(PeerAbsent, match="the group was dropped"):
        group.get("rank 0")


def test_a_peer_that_does_not_come_is_named(group: Rendezvous) -> None:
    with pytest.raises(PeerAbsent, match=r"rank 2 did not come within 0.01 s"):
        group.meet(0, (0, 2), 0.01)
