"""What is written in the database does not follow the names of classes, and what earlier versions wrote is read."""

from __future__ import annotations

import json

from tetriserve.core.request import MP4, Request, Shape, VideoOptions
from tetriserve.core.stages import image_stages
from tetriserve.journal import Entry, Key, VideoFacts
from tetriserve.journal.records import (
    Course,
    Failure,
    KeptImage,
    KeptVideo,
    _seal,
    kind_of,
    record_of,
    row_of,
)

ENTRY = Entry(
    key=Key("tenant", "k"), digest="d", model="tiny", fingerprint="0123", arrived_at=1000.0,
    requests=(
        Request(
            request_id="a", prompt="a ship", shape=Shape(64, 64), stages=image_stages(4), seed=1, arrival_s=0.0,
            deadline_s=9.0,
        ),
    ),
)  # fmt: skip


def test_kinds_on_disk_keep_their_names() -> None:
    kinds = (Entry, Course, KeptImage, KeptVideo, Failure)
    assert [kind_of(kind) for kind in kinds] == ["entry", "course", "picture", "video", "failure"]


def test_entries_of_versions_that_knew_no_videos_are_read() -> None:
    kind, name, payload, _ = row_of(ENTRY)
    said = json.loads(payload)
    assert said.pop("video") is None
    for request in said["requests"]:
        del request["video"], request["model"], request["lora"]
    old = json.dumps(said).encode()
    assert record_of((kind, name, old, _seal(kind, name, old))) == ENTRY


def test_an_entry_of_a_video_comes_back_as_it_was() -> None:
    (request,) = ENTRY.requests
    request = Request(
        request_id="a", prompt="a ship", shape=Shape(64, 64, 9), stages=request.stages, seed=1, arrival_s=0.0,
        deadline_s=9.0, media_type=MP4, video=VideoOptions(16.0, flow_shift=3.0), model="videos",
    )  # fmt: skip
    facts = VideoFacts(
        id="video_a", model="tiny", remixed_from="video_b", warnings=("num_frames: 10 was rounded to 9",)
    )
    entry = Entry(
        key=ENTRY.key, digest="d", model="tiny", fingerprint="0123", arrived_at=1.0, requests=(request,), video=facts
    )
    assert record_of(row_of(entry)) == entry
