"""From frames to the bytes of a video file, as they come: a video's frames are never all in memory at once.

Frames are encoded by PyAV, which brings FFmpeg's libraries along with x264 (the extra `video`).
"""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from tetriserve.core.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

_CODEC = "libx264"
_CODEC_OPTIONS = {"crf": "18", "preset": "veryfast", "mbtree": "0"}
"""A quality at which losses are hardly seen, and a speed at which encoding takes a few percent of decoding. With x264's
tree of macroblocks the bytes depend on memory that it has not set (core 165): `MALLOC_PERTURB_` changes them."""
_FPS_DENOMINATOR = 1001
_THUMBNAIL_QUALITY = 85
_THUMBNAIL_SIDE = 512


def check_encoder() -> None:
    """
    Raises:
        ConfigError: what encodes videos is not installed; the message says how to install it.
    """
    try:
        import av
    except ModuleNotFoundError:
        raise ConfigError("videos need the package av; install it with: pip install 'tetriserve[video]'") from None
    if _CODEC not in av.codecs_available:
        raise ConfigError(f"videos need FFmpeg's encoder {_CODEC}, which this build of the package av lacks")


@dataclass(frozen=True)
class VideoFile:
    """`video` is an MP4 file (H.264), `thumbnail` a JPEG file of its first frame."""

    video: bytes = field(repr=False)
    thumbnail: bytes = field(repr=False)


class VideoWriter:
    """Encodes frames as they are added. The same frames give the same bytes."""

    def __init__(self, height: int, width: int, fps: float) -> None:
        """
        Args:
            height, width: of the frames, both even.

        Raises:
            ConfigError: as `check_encoder`.
        """
        check_encoder()
        import av

        # A file with a name: the index, which players want at the beginning, is moved there in the end.
        self._directory = tempfile.TemporaryDirectory(prefix="tetriserve-video-")
        self._path = Path(self._directory.name) / "video.mp4"
        self._container = av.open(str(self._path), "w", options={"movflags": "+faststart"})
        stream = self._container.add_stream(
            _CODEC, rate=Fraction(fps).limit_denominator(_FPS_DENOMINATOR), options=_CODEC_OPTIONS
        )
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.thread_count = 1  # as other work of a rank; slices of more threads would be other bytes
        self._stream = stream
        self._thumbnail = b""

    def add(self, frames: np.ndarray) -> None:
        """More frames, uint8, (number, height, width, 3)."""
        import av

        if not self._thumbnail and len(frames):
            self._thumbnail = _thumbnail_of(frames[0])
        for frame in frames:
            for packet in self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                self._container.mux(packet)

    def finish(self) -> VideoFile:
        """The file; nothing can be added after that. There must be a frame."""
        for packet in self._stream.encode():
            self._container.mux(packet)
        self._container.close()
        with self._directory:
            return VideoFile(self._path.read_bytes(), self._thumbnail)


def _thumbnail_of(frame: np.ndarray) -> bytes:
    picture = Image.fromarray(frame)
    picture.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=_THUMBNAIL_QUALITY)
    return file.getvalue()
