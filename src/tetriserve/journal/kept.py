"""All that a journal knows of an entry, put together from its records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from tetriserve.journal.records import (
    Course,
    Entry,
    Failure,
    KeptFile,
    KeptImage,
    KeptOutput,
    KeptVideo,
    Record,
    kind_of,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """All that is known of an entry. Courses and outputs are by request id."""

    entry: Entry
    courses: dict[str, Course] = field(default_factory=dict)
    outputs: dict[str, KeptOutput] = field(default_factory=dict)
    failure: Failure | None = None

    @property
    def ended_at(self) -> float | None:
        """Unix time; None while it is unfinished."""
        if self.failure is not None:
            return self.failure.failed_at
        if len(self.outputs) < len(self.entry.requests):
            return None
        return max(output.stored_at for output in self.outputs.values())

    @property
    def files(self) -> tuple[KeptFile, ...]:
        files = [file for course in self.courses.values() for file in course.files]
        return (*files, *(file for output in self.outputs.values() for file in output.files))


def assembled(records: Iterable[Record]) -> list[Kept]:
    """What belongs together, in order of arrival. Records without their entry are left out."""
    by_kind: defaultdict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        by_kind[kind_of(type(record))][record.name] = record
    kept = []
    for entry in by_kind["entry"].values():
        assert isinstance(entry, Entry)
        failure = by_kind["failure"].get(entry.name)
        assert failure is None or isinstance(failure, Failure)
        courses = {name: one for name in entry.request_ids if isinstance(one := by_kind["course"].get(name), Course)}
        made = by_kind[kind_of(KeptImage)] | by_kind[kind_of(KeptVideo)]
        outputs = {name: one for name in entry.request_ids if isinstance(one := made.get(name), KeptImage | KeptVideo)}
        kept.append(Kept(entry=entry, courses=courses, outputs=outputs, failure=failure))
    return sorted(kept, key=lambda one: one.entry.arrived_at)
