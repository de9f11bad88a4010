"""What is written in the database does not follow the names of classes."""

from __future__ import annotations

from tetriserve.journal.records import Course, Entry, Failure, KeptImage, kind_of


def test_kinds_on_disk_keep_their_names() -> None:
    assert [kind_of(kind) for kind in (Entry, Course, KeptImage, Failure)] == ["entry", "course", "picture", "failure"]
