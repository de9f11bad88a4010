"""What may be asked of a video: how many frames, how fast, and what follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tetriserve.core.errors import InvalidRequest
from tetriserve.core.request import Shape, VideoOptions
from tetriserve.models.card import ModelCard
from tetriserve.profile.cost import ProfileCost

MIN_FPS, MAX_FPS = 1.0, 120.0
MAX_GUIDANCE_SCALE = 100.0
MIN_FLOW_SHIFT, MAX_FLOW_SHIFT = 0.01, 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoWish:
    """What a client may say about a video beside what it may say about an image; None leaves the choice to the server.

    num_frames: rounded to the nearest number that the model can make; `seconds` of `fps` frames each stand for as many.
    The others are those of `core.request.VideoOptions`.
    """

    num_frames: int | None = None
    seconds: float | None = None
    fps: float | None = None
    guidance_scale_2: float | None = None
    boundary_ratio: float | None = None
    flow_shift: float | None = None


@dataclass(frozen=True)
class VideoRules:
    """The rules of one served model; `cost` says what was measured."""

    card: ModelCard
    cost: ProfileCost

    def check_kind(self, *, is_video: bool) -> None:
        """
        Raises:
            InvalidRequest: a video is asked of a model that makes images, or an image of one that makes videos.
        """
        if is_video and not self.card.makes_videos:
            raise InvalidRequest(f"{self.card.name} makes images, and no videos", "model")
        if not is_video and self.card.makes_videos:
            raise InvalidRequest(f"{self.card.name} makes videos, and no images", "model")

    def options(self, wish: VideoWish) -> VideoOptions:
        """
        Raises:
            InvalidRequest: a value is out of range, or has no meaning for the model.
        """
        self._check_known(wish)
        return VideoOptions(
            fps=self.fps(wish),
            guidance_scale_2=_in_range("guidance_scale_2", wish.guidance_scale_2, 0.0, MAX_GUIDANCE_SCALE),
            boundary_ratio=_in_range("boundary_ratio", wish.boundary_ratio, 0.0, 1.0),
            flow_shift=_in_range("flow_shift", wish.flow_shift, MIN_FLOW_SHIFT, MAX_FLOW_SHIFT),
        )

    def fps(self, wish: VideoWish) -> float:
        """Frames per second of the file.

        Raises:
            InvalidRequest: it is out of range.
        """
        fps = _in_range("fps", wish.fps, MIN_FPS, MAX_FPS)
        return self.card.default_fps if fps is None else fps

    def num_frames(self, wish: VideoWish, size: Shape | None) -> int:
        """The nearest number that the model can make to the one asked for. Without one, that of the model's own size
        with the height and width of `size`, or else of its first.

        Raises:
            InvalidRequest: fewer than one frame is asked for, or more than the model makes, or two numbers.
        """
        wanted = self._wanted(wish)
        if wanted is None:
            own = self.card.sizes
            like = [each for each in own if size is not None and (each.height, each.width) == (size.height, size.width)]
            return (like or [*own])[0].frames
        return self._nearest(wanted)

    def rounding(self, wish: VideoWish) -> str | None:
        """What an answer says where the number of frames is not the one that was asked for; None where it is.

        Raises: as `num_frames`.
        """
        wanted = self._wanted(wish)
        if wanted is None or self._nearest(wanted) == wanted:
            return None
        rule = f"{self.card.name} makes 1 + a multiple of {self.card.frame_step}"
        if wish.num_frames is not None:
            return f"num_frames: {wanted} was rounded to {self._nearest(wanted)}: {rule}"
        asked = f"seconds: {wish.seconds:g} at {self.fps(wish):g} frames per second is {wanted} frames"
        return f"{asked}, which was rounded to {self._nearest(wanted)}: {rule}"

    def check_measured(self, shape: Shape, wish: VideoWish, size: str | None) -> None:
        """`size`: as the client wrote it.

        Raises:
            InvalidRequest: the video is larger than what was measured, or smaller.
        """
        profile, largest = self.cost.profile, self.cost.largest
        smallest = profile.shapes[0]
        low, num_pixels, high = map(profile.num_latent_pixels, (smallest, shape, largest))
        if low <= num_pixels <= high:
            return
        param = "size" if size is not None else "num_frames" if wish.seconds is None else "seconds"
        frames = "1 frame" if shape.frames == 1 else f"{shape.frames} frames"
        raise InvalidRequest(
            f"{param}: a video of {shape.width}x{shape.height} with {frames} is too "
            f"{'small' if num_pixels < low else 'large'}; allowed: from {_spelt(smallest)} to {_spelt(largest)}",
            param,
        )

    def _check_known(self, wish: VideoWish) -> None:
        for param, value, is_known, why in (
            ("guidance_scale_2", wish.guidance_scale_2, self.card.has_boundary, "has no second transformer"),
            ("boundary_ratio", wish.boundary_ratio, self.card.has_boundary, "has no second transformer"),
            ("flow_shift", wish.flow_shift, self.card.has_flow_shift, "takes no shift of its noise levels"),
        ):
            if value is not None and not is_known:
                raise InvalidRequest(f"{param} is {value:g}, but {self.card.name} {why}", param)

    def _wanted(self, wish: VideoWish) -> int | None:
        """Frames as they are asked for, in whichever way."""
        most, by_seconds = self.card.max_frames, self._frames_of_seconds(wish)
        if wish.num_frames is None:
            return by_seconds
        if not 1 <= wish.num_frames <= most:
            raise InvalidRequest(f"num_frames is {wish.num_frames}; allowed: 1 to {most}", "num_frames")
        if by_seconds is not None and self._nearest(by_seconds) != self._nearest(wish.num_frames):
            raise InvalidRequest(
                f"seconds is {wish.seconds:g}, which is {by_seconds} frames, and num_frames is {wish.num_frames}; "
                "leave one out",
                "seconds",
            )
        return wish.num_frames

    def _frames_of_seconds(self, wish: VideoWish) -> int | None:
        if wish.seconds is None:
            return None
        fps, most = self.fps(wish), self.card.max_frames
        if not math.isfinite(wish.seconds) or not 1 <= round(wish.seconds * fps) <= most:
            allowed = f"allowed: {1 / fps:.3g} to {most / fps:.3g}, which is 1 to {most} frames at {fps:g} a second"
            raise InvalidRequest(f"seconds is {wish.seconds:g}; {allowed}", "seconds")
        return round(wish.seconds * fps)

    def _nearest(self, num_frames: int) -> int:
        """Of two that are as near the larger one, within what the model makes."""
        step = self.card.frame_step
        most = (self.card.max_frames - 1) // step
        return 1 + step * min((2 * (num_frames - 1) + step) // (2 * step), most)


def _in_range(param: str, value: float | None, low: float, high: float) -> float | None:
    if value is not None and not low <= value <= high:
        raise InvalidRequest(f"{param} is {value:g}; allowed: {low:g} to {high:g}", param)
    return value


def _spelt(shape: Shape) -> str:
    return f"{shape.width}x{shape.height} with {shape.frames} frame{'s' if shape.frames != 1 else ''}"
