"""Times read off a profile: looked up where measured, interpolated over tokens in between, refused outside."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from tetriserve.core.errors import ProfileError
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape
from tetriserve.profile.corrections import Corrections, make_room
from tetriserve.profile.table import DenoiseRow, Profile

_Question = tuple[str, Shape, int, tuple[int, ...] | None]
"""Kind of stage, shape, passes, degrees."""


@dataclass(frozen=True)
class ProfileCost:
    """The `CostModel` of a profile, corrected online.

    `corrections` are what observed times of encode, denoise and decode tasks taught. `switch_s` and `move_s` stay as
    profiled: on a loaded machine they grew by 3 ms a task, where steps grew by 30 to 900 and decodes by seconds.

    `degrees_of` says at which degrees a shape may run; by default at every degree of the profile.
    """

    profile: Profile
    degrees_of: Callable[[Shape], Sequence[int]] | None = None
    corrections: Corrections = field(default_factory=Corrections)
    _memo: dict[_Question, Mapping[int, float]] = field(default_factory=dict, repr=False, compare=False)
    _decode_memo: dict[Shape, float] = field(default_factory=dict, repr=False, compare=False)

    def times(self, request: Request, stage: str) -> Mapping[int, float]:
        """See `CostModel.times`; of the degrees that the request allows.

        Raises:
            ProfileError: the shape lies outside the measured range.
        """
        key = stage, request.shape, request.num_passes, request.degrees
        times = self._memo.get(key)
        if times is None:
            make_room(self._memo)
            times = self._memo[key] = MappingProxyType(self._times(request, stage))
        return times

    def _times(self, request: Request, stage: str) -> dict[int, float]:
        match stage:
            case "encode":
                return {1: self.corrections.encode * self.profile.encode_s * request.num_passes}
            case "decode":
                return {1: self.corrections.of_decode(request.shape) * self._decode_s(request.shape)}
            case _:
                return {
                    degree: profiled * self.corrections.of_step(request.shape, degree) * request.num_passes
                    for degree, profiled in self.profiled_step_times(request.shape).items()
                    if request.degrees is None or degree in request.degrees
                }

    def profiled_step_times(self, shape: Shape) -> Mapping[int, float]:
        """One forward per degree as the profile has it, without correction.

        A degree measured only for other sizes, all of them larger or all smaller, is left out. If that leaves none, it
        is an error that names the range of the narrowest.
        """
        allowed = self.profile.degrees if self.degrees_of is None else self.degrees_of(shape)
        if not allowed:
            raise ProfileError(f"{shape} can run at none of the degrees {list(self.profile.degrees)}")
        covered = [degree for degree in allowed if self._covers(shape, degree)]
        return {degree: self._step_s(shape, degree) for degree in covered or allowed[:1]}

    @property
    def switch_s(self) -> float:
        return self.profile.switch_s

    @property
    def move_s(self) -> float:
        return self.profile.move_s

    def observed(self, task: Task, request: Request, elapsed_s: float) -> ProfileCost:
        """The same model after one task of `request` took `elapsed_s`; `self` is unchanged."""
        shape, corrections = request.shape, self.corrections
        match task.stage:
            case "encode":
                corrections = corrections.after_encode(elapsed_s / (self.profile.encode_s * request.num_passes))
            case "denoise":
                profiled_s = task.num_steps * self._step_s(shape, task.degree) * request.num_passes
                corrections = corrections.after_step(shape, task.degree, elapsed_s / profiled_s)
            case "decode":
                corrections = corrections.after_decode(shape, elapsed_s / self._decode_s(shape))
        memo = {
            known: times
            for known, times in self._memo.items()
            if known[0] != task.stage or (known[1] != shape and task.stage != "encode")
        }
        return ProfileCost(self.profile, self.degrees_of, corrections, memo, self._decode_memo)

    def _step_s(self, shape: Shape, degree: int) -> float:
        rows = self._rows(degree)
        for row in rows:
            if row.shape == shape:
                return row.step_s
        points = sorted({row.tokens: row.step_s for row in rows}.items())
        return _interpolate(points, _num_tokens(shape, rows[0]), f"a step of {shape} at degree {degree}", "tokens")

    def _decode_s(self, shape: Shape) -> float:
        """As the profile has it, without correction."""
        decode_s = self._decode_memo.get(shape)
        if decode_s is None:
            points = sorted((row.shape.num_pixels, row.decode_s) for row in self.profile.decode)
            decode_s = _interpolate(points, shape.num_pixels, f"decode of {shape}", "pixels")
            make_room(self._decode_memo)
            self._decode_memo[shape] = decode_s
        return decode_s

    def _covers(self, shape: Shape, degree: int) -> bool:
        rows = self._rows(degree)
        measured = [row.tokens for row in rows]
        return any(row.shape == shape for row in rows) or (
            min(measured) <= _num_tokens(shape, rows[0]) <= max(measured)
        )

    def _rows(self, degree: int) -> list[DenoiseRow]:
        rows = [row for row in self.profile.denoise if row.degree == degree and row.batch == 1]
        if not rows:
            raise ProfileError(f"profile has no row at degree {degree}; it has {list(self.profile.degrees)}")
        return rows


def _num_tokens(shape: Shape, row: DenoiseRow) -> float:
    """Tokens of `shape`, as many per pixel as `row` has."""
    return shape.num_pixels * row.tokens / row.shape.num_pixels


def _interpolate(points: Sequence[tuple[float, float]], x: float, what: str, unit: str) -> float:
    """Piecewise linear through `points` (sorted by x); outside their range is an error, never a guess."""
    low, high = points[0][0], points[-1][0]
    if not low <= x <= high:
        raise ProfileError(f"{what} is {x:g} {unit}, outside the profile's range {low:g} to {high:g}")
    right = bisect_left(points, x, key=lambda point: point[0])
    (x1, y1) = points[right]
    if x1 == x:
        return y1
    (x0, y0) = points[right - 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
