"""What those who wait for an image or a video hear on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tetriserve.core.events import Submitted, TensorRef
from tetriserve.core.request import Request
from tetriserve.core.trajectory import Trajectory
from tetriserve.models.video_file import VideoFile
from tetriserve.workload.outcome import Outcome

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class GeneratedImage:
    """`pixels` are uint8, (height, width, 3); `outcome` says what happened on the way."""

    pixels: np.ndarray
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file on disk; `checksum` is that of `journal.records`."""

    path: Path
    num_bytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class StoredVideo:
    """A video's files on disk: MP4, and JPEG. `stored_at`: unix time; None where it is not written beside them."""

    video: StoredFile
    thumbnail: StoredFile
    stored_at: float | None = None

    @property
    def num_bytes(self) -> int:
        return self.video.num_bytes + self.thumbnail.num_bytes


@dataclass(frozen=True)
class GeneratedVideo:
    """`content` is in memory when it has just been made, and on disk once a job has kept it."""

    content: VideoFile | StoredVideo
    outcome: Outcome


Generated = GeneratedImage | GeneratedVideo


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The request was admitted, or a task of it started or ended.

    stage: kind of the task's; at admission of the one that comes first.
    steps_done: of all stages that are over.
    degree: ranks that work for the request from now on; 0 for none.
    latents: what a task with steps left behind as it ended; gone as soon as the next one has ended.
    """

    request: Request
    stage: str
    steps_done: int
    degree: int
    latents: TensorRef | None = None


Watcher = Callable[[int, Progress | Generated], None]
"""Hears of one of several images, counted from 0, on the event loop. It should be quick: the pool waits."""

Accept = Callable[[Sequence[Submitted]], Awaitable[None]]
"""Makes an acceptance last, before anything runs."""


@dataclass
class Admitted:
    """A request that runs, and who waits for it: `made` ends with it, `tell` hears of it until then."""

    request: Request
    made: asyncio.Future[Generated]
    tell: Callable[[Progress | Generated], None]


def first_progress(event: Submitted) -> Progress:
    """What is heard at admission."""
    request, checkpoint = event.request, event.checkpoint
    if checkpoint is None:
        return Progress(request=request, stage=request.stages[0].kind, steps_done=0, degree=0)
    begun = Trajectory.at(request, checkpoint.stage_index, checkpoint.stage_steps_done)
    return Progress(request=request, stage=begun.stage.kind, steps_done=begun.steps_done, degree=0)


def unheard(update: Progress | Generated) -> None:
    """Nobody watches."""
