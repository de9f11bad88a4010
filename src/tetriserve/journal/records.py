"""What the journal holds, and how a record becomes bytes that tell whether they are still what was written.

Times within a record are seconds since the arrival of its entry, whose own time is unix time: engines come and go, each
with a clock of its own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tetriserve.core.events import FailureKind, Run
from tetriserve.core.request import Request
from tetriserve.workload.outcome import Outcome


class Corrupt(Exception):
    """A record or a file is not what was written."""


@dataclass(frozen=True, slots=True)
class Key:
    """A client's name for its work. `tenant` tells clients apart that may use the same name."""

    tenant: str
    name: str


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A file beside the database, and what it must hold."""

    name: str
    num_bytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class KeptTensors:
    """A copy of what a task left in the store under `key`."""

    key: str
    file: KeptFile


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFacts:
    """What is said of a video beside its request.

    id: by which clients ask for it.
    model: as clients call it.
    remixed_from: id of the video whose prompt was changed.
    warnings: what was rounded or ignored, a sentence each.
    """

    id: str
    model: str
    remixed_from: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Accepted work: the requests of one call, admitted together.

    digest: of what was asked for; the same key with another one is a mistake.
    model, fingerprint: of the model that its requests are for.
    arrived_at: unix time.
    video: where it is one, of one request.
    """

    key: Key
    digest: str
    model: str
    fingerprint: str
    arrived_at: float
    requests: tuple[Request, ...]
    video: VideoFacts | None = None

    @property
    def name(self) -> str:
        return self.requests[0].request_id

    @property
    def request_ids(self) -> tuple[str, ...]:
        return tuple(request.request_id for request in self.requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How far a request has come.

    num_starts: attempts, one after the other, in which tasks of it were started and none finished: lives of the server,
        and calls that ended with lost workers.
    stage_index: of the stage that comes next or goes on, after `stage_steps_done` of its steps.
    states: what each kind of stage left last; empty if none has left anything.
    """

    request_id: str
    num_starts: int = 0
    stage_index: int = 0
    stage_steps_done: int = 0
    runs: tuple[Run, ...] = ()
    states: dict[str, KeptTensors] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.request_id

    @property
    def files(self) -> tuple[KeptFile, ...]:
        return tuple(tensors.file for tensors in self.states.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptImage:
    """A finished image. `stored_at` is unix time; `file` holds uint8 values, in order of `shape`."""

    request_id: str
    stored_at: float
    outcome: Outcome
    shape: tuple[int, ...]
    file: KeptFile

    @property
    def name(self) -> str:
        return self.request_id

    @property
    def files(self) -> tuple[KeptFile, ...]:
        return (self.file,)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptVideo:
    """A finished video: an MP4 file, and a JPEG file of its first frame. `stored_at` is unix time."""

    request_id: str
    stored_at: float
    outcome: Outcome
    video: KeptFile
    thumbnail: KeptFile

    @property
    def name(self) -> str:
        return self.request_id

    @property
    def files(self) -> tuple[KeptFile, ...]:
        return self.video, self.thumbnail


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The entry ended without its images. `failed_at` is unix time; `message` and `kind` are for its client."""

    entry: str
    failed_at: float
    message: str
    kind: FailureKind | None = None

    @property
    def name(self) -> str:
        return self.entry


KeptOutput = KeptImage | KeptVideo
Record = Entry | Course | KeptImage | KeptVideo | Failure
Row = tuple[str, str, bytes, bytes]
"""kind, name, payload, checksum: kind and name identify it."""

_KINDS: dict[str, type[Record]] = {
    "entry": Entry,
    "course": Course,
    "picture": KeptImage,
    "video": KeptVideo,
    "failure": Failure,
}
"""By what is written in the database: it outlives the names of classes."""
_KIND_NAMES: dict[type[object], str] = {kind: name for name, kind in _KINDS.items()}


def kind_of(record: type[object]) -> str:
    return _KIND_NAMES[record]


def row_of(record: Record) -> Row:
    kind, name = kind_of(type(record)), record.name
    payload = json.dumps(_adapter(kind).dump_python(record, mode="json")).encode()
    return kind, name, payload, _seal(kind, name, payload)


def record_of(row: tuple[object, ...]) -> Record:
    """
    Raises:
        Corrupt: the row is not what `row_of` made.
    """
    kind, name, payload, checksum = row
    if not (isinstance(kind, str) and isinstance(name, str) and isinstance(payload, bytes)) or kind not in _KINDS:
        raise Corrupt("a record of no known kind")
    if checksum != _seal(kind, name, payload):
        raise Corrupt(f"{kind} {name[:40]!r} does not match its checksum")
    try:
        record: Record = _adapter(kind).validate_python(json.loads(payload))
    except (ValidationError, ValueError) as error:  # another version wrote it
        raise Corrupt(f"{kind} {name[:40]!r} cannot be read: {type(error).__name__}") from None
    return record


class Checksum:
    """Of what is read in pieces; of the whole as `checksum_of` has it."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def update(self, data: bytes) -> None:
        self._digest.update(data)

    @property
    def text(self) -> str:
        return self._digest.hexdigest()


def checksum_of(data: bytes) -> str:
    checksum = Checksum()
    checksum.update(data)
    return checksum.text


def _seal(kind: str, name: str, payload: bytes) -> bytes:
    """A digest of the whole row, so that a payload under another's name is noticed too."""
    head = f"{kind}\0{name}\0".encode(errors="replace")
    return hashlib.blake2b(head + payload, digest_size=16).digest()


@cache
def _adapter(kind: str) -> TypeAdapter[Any]:
    return TypeAdapter(_KINDS[kind])
