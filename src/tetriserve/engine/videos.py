"""Videos as their clients know them: each is a job with an id, from its acceptance until it expires."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from tetriserve.core.errors import RequestFailed
from tetriserve.core.events import FailureKind
from tetriserve.core.request import Request
from tetriserve.engine.job import Known
from tetriserve.engine.progress import Generated, GeneratedVideo, Progress, StoredFile, StoredVideo
from tetriserve.journal import Key, VideoFacts
from tetriserve.journal.records import checksum_of
from tetriserve.models.video_file import VideoFile
from tetriserve.worker.store import StoreDirectory

MAX_BYTES = 2**33
"""Of the files of all finished videos: some hundred of 720p. Beyond, the oldest are given up before their time."""
_PREFIX = "tetriserve-videos-"


class VideoStatus(StrEnum):
    """As OpenAI's API names them."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(kw_only=True)
class Video(Known):
    """A key that stands for a video.

    created_at: unix time.
    request: None until it is admitted.
    made: None until it is on disk.
    has_started: whether a task of it was ever started.
    steps_done: of its request.
    is_deleted: its client wants no more of it.
    """

    key: Key
    facts: VideoFacts
    created_at: float
    request: Request | None = None
    made: GeneratedVideo | None = field(default=None, repr=False)
    has_started: bool = False
    steps_done: int = 0
    is_deleted: bool = False

    @property
    def status(self) -> VideoStatus:
        if self.failure is not None:
            return VideoStatus.FAILED
        if self.ended_at is not None:
            return VideoStatus.COMPLETED
        return VideoStatus.IN_PROGRESS if self.has_started else VideoStatus.QUEUED

    def percent(self, num_running: int = 0) -> int:
        """Of its steps, `num_running` of which have been made since the last task ended; 100 is kept for what can be
        downloaded.
        """
        if self.status is VideoStatus.COMPLETED:
            return 100
        num_steps = 0 if self.request is None else self.request.num_steps
        return min(99, 100 * (self.steps_done + num_running) // num_steps) if num_steps else 0

    @property
    def stored(self) -> StoredVideo | None:
        """Its files."""
        content = None if self.made is None else self.made.content
        return content if isinstance(content, StoredVideo) else None

    @property
    def num_bytes(self) -> int:
        return 0 if self.stored is None else self.stored.num_bytes

    def hear(self, number: int, update: Progress | Generated) -> None:
        if isinstance(update, Progress):
            first = update.request.stages[0]
            self.request, self.steps_done = update.request, update.steps_done
            self.has_started |= update.degree > 0 or update.steps_done > 0 or update.stage != first.kind
        elif isinstance(update, GeneratedVideo):
            self.made, self.request = update, update.outcome.request
            self.has_started, self.steps_done = True, update.outcome.request.num_steps

    def lose(self) -> None:
        """Its files are gone, or damaged: it is as it was when it was accepted."""
        self.made = self.ended_at = None
        self.has_started, self.steps_done = False, 0


class VideoFiles:
    """Files of videos that a server without a journal has made, in a temporary directory that goes with it."""

    def __init__(self) -> None:
        self._directory: StoreDirectory | None = None
        self._making = threading.Lock()

    async def keep(self, name: str, files: VideoFile) -> StoredVideo:
        """
        Raises:
            RequestFailed: there is no room for it.
        """
        writing = asyncio.ensure_future(asyncio.to_thread(self._write, name, files))
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:
            writing.add_done_callback(_remove_late)  # a thread cannot be cancelled
            raise
        except OSError as error:
            why = f"there is no room for the finished video: {error.strerror}"
            raise RequestFailed(why, FailureKind.STORE) from error

    def close(self) -> None:
        if self._directory is not None:
            self._directory.remove()

    def _write(self, name: str, files: VideoFile) -> StoredVideo:
        with self._making:
            if self._directory is None:
                self._directory = StoreDirectory(Path(tempfile.gettempdir()), _PREFIX)
            self._directory.restore()
        video, thumbnail = self._directory.path / f"{name}.mp4", self._directory.path / f"{name}.jpg"
        try:
            return StoredVideo(_written(video, files.video), _written(thumbnail, files.thumbnail))
        except BaseException:
            for path in (video, thumbnail):
                path.unlink(missing_ok=True)  # half a file takes what room is left
            raise


def remove(stored: StoredVideo) -> None:
    for file in (stored.video, stored.thumbnail):
        file.path.unlink(missing_ok=True)


def _written(path: Path, data: bytes) -> StoredFile:
    path.write_bytes(data)
    return StoredFile(path, len(data), checksum_of(data))


def _remove_late(writing: asyncio.Future[StoredVideo]) -> None:
    if not writing.cancelled() and writing.exception() is None:
        remove(writing.result())
