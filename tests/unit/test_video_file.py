"""The same frames are the same file, which players read."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tetriserve.models.video_file import VideoFile, VideoWriter

av = pytest.importorskip("av")

HEIGHT, WIDTH, FPS = 64, 96, 12.5


def frames_of(number: int = 9) -> np.ndarray:
    """Smooth colours that move to the right."""
    rows, columns = np.linspace(0, 170, HEIGHT)[:, None], np.linspace(20, 80, WIDTH)[None, :]
    first = np.stack([rows + columns, 255 - rows - columns / 2, 100 + columns - rows / 3], axis=-1).astype(np.uint8)
    return np.stack([np.roll(first, 2 * each, axis=1) for each in range(number)])


def written(*parts: np.ndarray) -> VideoFile:
    writer = VideoWriter(HEIGHT, WIDTH, FPS)
    for part in parts:
        writer.add(part)
    return writer.finish()


def test_the_same_frames_are_the_same_bytes_every_time_and_however_they_come() -> None:
    frames = frames_of()
    files = {written(frames).video for _ in range(40)}
    files |= {written(frames[:1], frames[1:5], frames[5:]).video for _ in range(20)}
    assert len(files) == 1


def test_a_player_gets_the_frames_nearly_as_they_were_and_at_their_speed() -> None:
    frames = frames_of()
    file = written(frames)
    with av.open(io.BytesIO(file.video)) as container:
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert float(container.streams.video[0].average_rate) == FPS
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).mean() < 4
    thumbnail = Image.open(io.BytesIO(file.thumbnail))
    assert (thumbnail.format, thumbnail.size) == ("JPEG", (WIDTH, HEIGHT))
    assert np.abs(np.asarray(thumbnail).astype(int) - frames[0]).mean() < 4
