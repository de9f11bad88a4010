"""Times read off a profile: looked up where measured, interpolated over tokens in between, refused outside."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from tetriserve.core.errors import ProfileError
from tetriserve.core.plan import Task
from tetriserve.core.request import Request, Shape, Stage
from tetriserve.profile.corrections import Case, Corrections, make_room
from tetriserve.profile.table import Profile, Row

_Question = tuple[str, Shape, int, tuple[int, ...] | None, int]
"""Kind of stage, shape, passes, degrees, batch."""


@dataclass(frozen=True)
class ProfileCost:
    """The `CostModel` of a profile, corrected online.

    `corrections` are what observed times of tasks taught. `switch_s`, `move_s`, `team_s` and `lora_s` stay as measured:
    on a loaded machine the first two grew by 3 ms a task, where steps grew by 30 to 900 and decodes by seconds.

    `degrees_of` says at which degrees the sequence of a shape may be shared, `short_degrees_of` at which a stage of a
    kind without one can run, for a shape; by default at every degree of the profile. `batch_limit` bounds batches
    beyond what was measured. `estimates` is the profile with rows of sizes that were not measured; None for none.
    `measured_lora_s` takes the place of a `lora_s` that the profile lacks: it depends on the adapters that a server has
    loaded.

    **Batches.** Between two measured batch sizes times are interpolated; beyond the largest, and where none was
    measured, requests cost as much each as in the largest that was: without measured batches, a batch costs the sum.
    """

    profile: Profile
    degrees_of: Callable[[Shape], Sequence[int]] | None = None
    corrections: Corrections = field(default_factory=Corrections)
    batch_limit: int | None = None
    estimates: Profile | None = None
    measured_lora_s: float = 0.0
    short_degrees_of: Callable[[str, Shape], Sequence[int]] | None = None
    _memo: dict[_Question, Mapping[int, float]] = field(default_factory=dict, repr=False, compare=False)
    _profiled: dict[Case, float] = field(default_factory=dict, repr=False, compare=False)
    _known_cases: dict[tuple[str, Shape], list[Case]] = field(default_factory=dict, repr=False, compare=False)

    def times(self, request: Request, stage: Stage, batch: int = 1) -> Mapping[int, float]:
        """See `CostModel.times`; of the degrees that the request allows.

        Raises:
            ProfileError: the profile has no such stage, or the shape lies outside the measured range.
        """
        key = stage.kind, stage.shape or request.shape, stage.num_passes, request.degrees, batch
        times = self._memo.get(key)
        if times is None:
            make_room(self._memo)
            times = self._memo[key] = MappingProxyType(self._times(request, stage, batch))
        return times

    def _times(self, request: Request, stage: Stage, batch: int) -> dict[int, float]:
        cases = self._cases(stage.kind, stage.shape or request.shape, batch)
        if stage.num_steps and request.degrees is not None:
            cases = [case for case in cases if case.degree in request.degrees]
        return {case.degree: self._passes_s(case, stage.num_passes) * self.corrections.of(case) for case in cases}

    def joins_passes(self, request: Request, stage: Stage, degree: int, batch: int) -> bool:
        """See `CostModel.joins_passes`: where the batch that they make together was measured, and is quicker."""
        case = Case(stage.kind, self._sized(stage.kind, stage.shape or request.shape), degree, batch)
        return self._passes_s(case, stage.num_passes) < stage.num_passes * self._profiled_s(case)

    def _passes_s(self, case: Case, num_passes: int) -> float:
        """All passes of a step, without correction, in the quicker way."""
        apart_s = num_passes * self._profiled_s(case)
        together = case._replace(batch=num_passes * case.batch)
        rows = self._rows(case.stage, case.degree) if num_passes > 1 and case.batch > 1 else []
        if any(row.batch >= together.batch for row in rows):
            return min(apart_s, self._profiled_s(together))
        return apart_s

    def profiled_step_times(self, shape: Shape) -> Mapping[int, float]:
        """One pass of a step by degree as the profile has it, without correction.

        A degree measured only for other sizes, all of them larger or all smaller, is left out. If that leaves none, it
        is an error that names the range of the narrowest.
        """
        stage = next(row.stage for row in self.profile.rows if row.tokens is not None)
        return {case.degree: self._profiled_s(case) for case in self._cases(stage, shape)}

    @cached_property
    def max_batch(self) -> int:
        """The largest batch in the profile, within the limit."""
        largest = max(row.batch for row in self.profile.rows)
        return largest if self.batch_limit is None else min(self.batch_limit, largest)

    @property
    def largest(self) -> Shape:
        """The size up to which times are known or estimated."""
        return self._table.shapes[-1]

    @property
    def _table(self) -> Profile:
        return self.estimates or self.profile

    @property
    def switch_s(self) -> float:
        return self.profile.switch_s

    @property
    def move_s(self) -> float:
        return self.profile.move_s

    @property
    def move_node_s(self) -> float:
        return max(self.profile.move_s, self.profile.move_node_s)

    @property
    def team_s(self) -> float:
        return self.profile.team_s

    @property
    def lora_s(self) -> float:
        return self.profile.lora_s or self.measured_lora_s

    def observed(self, task: Task, request: Request, elapsed_s: float) -> ProfileCost:
        """The same model after one task, of which `request` is a member, took `elapsed_s`; `self` is unchanged."""
        stage = request.stage_of(task.stage)
        case = Case(stage.kind, self._sized(stage.kind, stage.shape or request.shape), task.degree, task.batch)
        profiled_s = max(1, task.num_steps) * self._passes_s(case, stage.num_passes)
        corrections = self.corrections.after(case, elapsed_s / profiled_s)
        memo = {
            known: times
            for known, times in self._memo.items()
            if known[0] != case.stage or (case.shape is not None and known[1] != case.shape)
        }
        return ProfileCost(
            self.profile,
            self.degrees_of,
            corrections,
            self.batch_limit,
            self.estimates,
            self.measured_lora_s,
            self.short_degrees_of,
            memo,
            self._profiled,
            self._known_cases,
        )

    def _cases(self, kind: str, shape: Shape, batch: int = 1) -> list[Case]:
        """One for each degree that a stage of `shape` may have, ascending; see `profiled_step_times`."""
        key = kind, shape
        known = self._known_cases.get(key)
        if known is None:
            make_room(self._known_cases)
            known = self._known_cases[key] = self._find_cases(kind, shape)
        return known if batch == 1 else [case._replace(batch=batch) for case in known]

    def _find_cases(self, kind: str, shape: Shape) -> list[Case]:
        rows = self._table.rows_of(kind)
        if not rows:
            raise ProfileError(f"profile has no stage {kind!r}; it has {', '.join(self.profile.stages)}")
        measured: Sequence[int] = sorted({row.degree for row in rows})
        allowed = measured
        if rows[0].tokens is not None and self.degrees_of is not None:
            allowed = self.degrees_of(shape)
            if not allowed:
                raise ProfileError(f"{shape} can run at none of the degrees {measured}")
        elif rows[0].tokens is None and self.short_degrees_of is not None:
            can_run = self.short_degrees_of(kind, shape)
            allowed = [degree for degree in measured if degree in can_run] or measured[:1]
        covered = [degree for degree in allowed if self._covers(kind, shape, degree)]
        sized = self._sized(kind, shape)
        return [Case(kind, sized, degree) for degree in covered or allowed[:1]]

    def _sized(self, kind: str, shape: Shape) -> Shape | None:
        """What tells the times of `shape` from those of others; None where nothing does."""
        return None if self._rows(kind)[0].shape is None else shape

    def _profiled_s(self, case: Case) -> float:
        """As the profile has it, without correction, for one pass."""
        seconds = self._profiled.get(case)
        if seconds is None:
            make_room(self._profiled)
            seconds = self._profiled[case] = self._batch_s(case)
        return seconds

    def _batch_s(self, case: Case) -> float:
        rows = self._rows(case.stage, case.degree)
        batches = sorted(
            {row.batch for row in rows if row.batch == 1 or self._are_around(_of_batch(rows, row.batch), case.shape)}
        )
        points = [(float(batch), self._size_s(_of_batch(rows, batch), case)) for batch in batches]
        largest, largest_s = points[-1]
        if case.batch >= largest:
            return largest_s * case.batch / largest
        return _interpolate(points, case.batch, "", "requests")

    def _covers(self, kind: str, shape: Shape, degree: int) -> bool:
        return self._are_around(_of_batch(self._rows(kind, degree), 1), shape)

    def _are_around(self, rows: Sequence[Row], shape: Shape | None) -> bool:
        """Whether `rows`, of one stage, degree and batch, have the shape, or one above and one below."""
        if shape is None or any(row.shape in (None, shape) for row in rows):
            return True
        measured = [self._size(row) for row in rows]
        return min(measured) <= self._size_like(shape, rows[0]) <= max(measured)

    def _size_s(self, rows: Sequence[Row], case: Case) -> float:
        """Seconds of the case's shape, between `rows`, which are of one stage, degree and batch."""
        shape = case.shape
        for row in rows:
            if row.shape == shape:
                return row.seconds
        assert shape is not None, "a stage has a row for every size, or none"
        points = sorted({self._size(row): row.seconds for row in rows}.items())
        size = self._size_like(shape, rows[0])
        if rows[0].tokens is None:
            return _interpolate(points, size, f"{case.stage} of {shape}", "pixels")
        return _interpolate(points, size, f"a step of {shape} at degree {case.degree}", "tokens")

    def _size(self, row: Row) -> float:
        """What the times of a stage go by: tokens, or else pixels of latent frames."""
        assert row.shape is not None
        return float(self.profile.num_latent_pixels(row.shape) if row.tokens is None else row.tokens)

    def _size_like(self, shape: Shape, row: Row) -> float:
        """The size of `shape`; with as many tokens per pixel of a latent frame as `row` has."""
        assert row.shape is not None
        num_pixels = self.profile.num_latent_pixels(shape)
        return (
            float(num_pixels)
            if row.tokens is None
            else num_pixels * row.tokens / self.profile.num_latent_pixels(row.shape)
        )

    def _rows(self, kind: str, degree: int | None = None) -> list[Row]:
        rows = [row for row in self._table.rows_of(kind) if degree is None or row.degree == degree]
        if not rows:
            raise ProfileError(f"profile has no row at degree {degree}; it has {list(self.profile.degrees)}")
        return rows


def _of_batch(rows: Sequence[Row], batch: int) -> list[Row]:
    return [row for row in rows if row.batch == batch]


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
