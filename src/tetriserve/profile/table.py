"""The profile file: versioned JSON with units in its names, validated in full before anything uses it.

```
{"format": "tetriserve-profile/2", "model": ..., "fingerprint": ..., "hardware": ...,
 "execution": {"dtype": "bfloat16", "attention": "default", ...}, "source": ..., "created": "2026-11-20", "doubt": "",
 "max_batch": 8, "frame_step": 1, "switch_s": 0.001, "move_s": 0.001, "team_s": 0.0, "lora_s": 0.0,
 "rows": [{"stage", "height", "width", "frames", "tokens", "degree", "batch", "seconds", "cv"}, ...]}
```

Files of the first format are read as well: they knew encode, denoise and decode, and of an execution its dtype.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from tetriserve.core.bounds import shown
from tetriserve.core.errors import ConfigError, ProfileError
from tetriserve.core.execution import Execution
from tetriserve.core.request import Shape
from tetriserve.core.stages import DECODE, DENOISE, ENCODE
from tetriserve.files import read_text

FORMAT = "tetriserve-profile/2"
_FIRST_FORMAT = "tetriserve-profile/1"
MIN_TIME_S, MAX_TIME_S = 1e-6, 1e4
"""Of a stage, or a step: what is outside is a slip of the pen, and a simulation of it does not end."""
MAX_VARIATION = 1000.0
_MAX_BYTES = 2**24
_MAX_COUNT = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Seconds of one stage for `batch` requests together: of one step, or of all of a short stage.

    height, width: None for a stage that takes the same for every size.
    tokens: of the sequence that the ranks share; None for a stage without one. Times of other sizes are interpolated
        over tokens, or else over pixels.
    cv: coefficient of variation of the measurement; None where unknown.
    """

    stage: str
    seconds: float
    height: int | None = None
    width: int | None = None
    frames: int = 1
    tokens: int | None = None
    degree: int = 1
    batch: int = 1
    cv: float | None = None

    @property
    def shape(self) -> Shape | None:
        return None if self.height is None or self.width is None else Shape(self.height, self.width, self.frames)

    @property
    def group(self) -> tuple[str, Shape | None, int]:
        """Rows of one group differ in their batches only."""
        return self.stage, self.shape, self.degree


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One model, run in one way on one kind of hardware.

    switch_s: seconds to start any task; move_s: on top of that, to start one on other ranks than the request's last;
        0 where nobody measured it, or where there is only one rank.
    move_node_s: the same if the request's last ranks are on another node; 0 if it was not measured: `move_s` counts.
    team_s: on top of that, to start one on a set of ranks that has not worked together before; 0 where any set will do,
        as over shared memory.
    lora_s: on top of that, to start one on ranks that have another LoRA active; 0 where nobody measured it.
    fingerprint: ties it to an architecture; empty means any.
    doubt: why its times may be too long; empty if nothing is known against them.
    max_batch: batches up to this were tried; there are rows of those that pay, and of the first that does not.
    frame_step: frames of a video that share a latent frame: times of numbers of frames that were not measured go by
        latent frames.
    """

    model: str
    hardware: str
    execution: Execution
    source: str
    created: str
    switch_s: float
    rows: tuple[Row, ...]
    fingerprint: str = ""
    move_s: float = 0.0
    move_node_s: float = 0.0
    team_s: float = 0.0
    lora_s: float = 0.0
    doubt: str = ""
    max_batch: int = 1
    frame_step: int = 1

    def __post_init__(self) -> None:
        _check_seconds(self.switch_s, "switch_s")
        for name in ("move_s", "move_node_s", "team_s", "lora_s"):
            if getattr(self, name) != 0:
                _check_seconds(getattr(self, name), name)
        _check_positive("max_batch", self.max_batch)
        _check_positive("frame_step", self.frame_step)
        for number, row in enumerate(self.rows):
            _check_row(f"rows[{number}]", row)
        if not self.shapes:
            raise ProfileError("profile has no row with tokens; a stage whose sequence is shared needs them")
        self._check_groups()
        self._check_covered()

    @property
    def degrees(self) -> tuple[int, ...]:
        """Of sequence parallelism."""
        return tuple(sorted({row.degree for row in self.rows if row.tokens is not None}))

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Measured shapes, smallest first."""
        found = {row.shape for row in self.rows if row.tokens is not None and row.shape is not None}
        return tuple(sorted(found, key=self.num_latent_pixels))

    @property
    def stages(self) -> tuple[str, ...]:
        """Kinds of stages, in the order of the rows."""
        return tuple(dict.fromkeys(row.stage for row in self.rows))

    def num_latent_pixels(self, shape: Shape) -> int:
        """Pixels of `shape`, of one frame for each latent frame: what times go by."""
        return shape.height * shape.width * (1 + (shape.frames - 1) // self.frame_step)

    def rows_of(self, stage: str) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.stage == stage)

    def _check_groups(self) -> None:
        """One row for each batch, one for a batch of 1 among them, and times that do not shrink as batches grow."""
        by_group = sorted(self.rows, key=lambda row: (str(row.group), row.batch))
        for (stage, shape, degree), rows in groupby(by_group, key=lambda row: row.group):
            where = f"{stage}{'' if shape is None else f' of {shape}'} at degree {degree}"
            batches = [*rows]
            if batches[0].batch != 1:
                raise ProfileError(f"profile has a row for {where}, batch {batches[0].batch}, but none for batch 1")
            for smaller, larger in pairwise(batches):
                if smaller.batch == larger.batch:
                    raise ProfileError(f"profile has two rows for {where}, batch {smaller.batch}")
                if larger.seconds < smaller.seconds:
                    raise ProfileError(
                        f"profile: {where} takes {smaller.seconds:g} s for a batch of {smaller.batch}, but "
                        f"{larger.seconds:g} s for {larger.batch}; a larger batch takes no less"
                    )

    def _check_covered(self) -> None:
        """Stages without tokens have rows that every shape lies between, or rows for all sizes; at their narrowest
        degree, since some shapes have no other."""
        for stage in self.stages:
            narrowest = min(row.degree for row in self.rows_of(stage))
            sizes = sorted(
                {
                    row.shape
                    for row in self.rows_of(stage)
                    if row.shape and row.tokens is None and row.degree == narrowest
                },
                key=self.num_latent_pixels,
            )
            for shape in self.shapes if sizes else ():
                low, high = self.num_latent_pixels(sizes[0]), self.num_latent_pixels(sizes[-1])
                if not low <= self.num_latent_pixels(shape) <= high:
                    raise ProfileError(
                        f"profile has no {stage} row that covers {shape}; they go from {sizes[0]} to {sizes[-1]}"
                    )


def load_profile(path: Path) -> Profile:
    """Read and validate a profile file.

    Raises:
        ProfileError: unreadable, not JSON, another format, an unknown or missing or ill-typed field, or a time that is
            not a positive number; the message names the file and the field.
    """
    try:
        document = json.loads(read_text(path, "profile", _MAX_BYTES))
    except ConfigError as error:
        raise ProfileError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"profile {path} is not JSON: {error}") from error
    try:
        return _from_document(document)
    except ProfileError as error:
        raise ProfileError(f"profile {path}: {error}") from error


def save_profile(profile: Profile, path: Path) -> None:
    """Write atomically, so that two servers measuring at once both leave a whole file.

    Raises:
        ProfileError: it cannot be written there.
    """
    try:
        write_whole(path, json.dumps({"format": FORMAT, **asdict(profile)}, indent=1) + "\n")
    except OSError as error:
        raise ProfileError(f"profile {path} cannot be written: {error.strerror}") from error


def write_whole(path: Path, text: str) -> None:
    """Write atomically, into a folder that is made if need be. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as scratch:
        whole = Path(scratch) / path.name
        whole.write_text(text)
        os.replace(whole, path)


def _from_document(document: object) -> Profile:
    if not isinstance(document, dict) or document.get("format") not in (FORMAT, _FIRST_FORMAT):
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise ProfileError(f"format is {found!r}; this version reads {FORMAT!r} and {_FIRST_FORMAT!r}")
    rest = {key: value for key, value in document.items() if key != "format"}
    if document["format"] == _FIRST_FORMAT:
        rest["rows"] = _first_rows(rest)
        if "dtype" in rest:
            rest["execution"] = {"dtype": rest.pop("dtype")}
    else:
        rest["rows"] = tuple(_rows(rest, "rows", {field.name: field.name for field in fields(Row)}))
    _check_names(Profile, rest, "profile")
    for name in ("model", "hardware", "source", "created", "fingerprint", "doubt"):
        if not isinstance(rest.get(name, ""), str):
            raise ProfileError(f"{name} must be a string")
    return Profile(**rest | {"execution": _execution(rest["execution"])})


def _execution(value: object) -> Execution:
    if not isinstance(value, dict):
        raise ProfileError("execution must be an object")
    _check_names(Execution, value, "execution")
    try:
        return Execution(**value)
    except ConfigError as error:
        raise ProfileError(f"execution: {error}") from None


def _first_rows(rest: dict[str, Any]) -> tuple[Row, ...]:
    """The tables of the first format, taken out of `rest`."""
    if "encode_s" not in rest:
        raise ProfileError("profile lacks the field 'encode_s'")
    encode_s = rest.pop("encode_s")
    _check_seconds(encode_s, "encode_s")
    names = {name: name for name in ("height", "width", "frames")}
    steps = {**names, "tokens": "tokens", "degree": "degree", "batch": "batch", "step_s": "seconds", "cv": "cv"}
    denoise = _rows(rest, "denoise", steps, required=("height", "width", "tokens", "degree", "step_s"), stage=DENOISE)
    required = ("height", "width", "decode_s")
    decode = _rows(rest, "decode", {**names, "decode_s": "seconds"}, required=required, stage=DECODE)
    for name, rows in (("denoise", denoise), ("decode", decode)):
        if not rows:
            raise ProfileError(f"profile has no {name} rows")
    del rest["denoise"], rest["decode"]
    return Row(stage=ENCODE, seconds=encode_s), *denoise, *decode


def _rows(
    document: dict[str, Any],
    table: str,
    names: dict[str, str],
    *,
    required: tuple[str, ...] = ("stage", "seconds"),
    **constants: Any,
) -> list[Row]:
    """The rows of one table. `names` maps those in the file to those of `Row`."""
    values = document.get(table)
    if not isinstance(values, list):
        raise ProfileError(f"{table} must be a list of rows")
    rows = []
    for number, value in enumerate(values):
        where = f"{table}[{number}]"
        if not isinstance(value, dict):
            raise ProfileError(f"{where} must be an object")
        _check_known(value, set(names), required, where)
        row = Row(**{names[name]: each for name, each in value.items()}, **constants)
        _check_row(where, row, next(name for name, ours in names.items() if ours == "seconds"))
        rows.append(row)
    return rows


def _check_names(kind: type[Any], values: dict[str, Any], where: str) -> None:
    known = {field.name for field in fields(kind)}
    required = [field.name for field in fields(kind) if field.default is MISSING]
    _check_known(values, known, required, where)


def _check_known(values: dict[str, Any], known: set[str], required: Iterable[str], where: str) -> None:
    if unknown := sorted(values.keys() - known):
        raise ProfileError(f"{where} has the unknown field {unknown[0]!r}")
    if missing := sorted(set(required) - values.keys()):
        raise ProfileError(f"{where} lacks the field {missing[0]!r}")


def _check_row(where: str, row: Row, seconds: str = "seconds") -> None:
    if not isinstance(row.stage, str) or not row.stage:
        raise ProfileError(f"{where}.stage is {shown(row.stage)}; it must be the name of a stage")
    _check_seconds(row.seconds, f"{where}.{seconds}")
    if (row.height is None) != (row.width is None) or (row.height is None and row.tokens is not None):
        raise ProfileError(f"{where} has a part of a size; it needs height and width, or neither they nor tokens")
    for name in ("height", "width", "frames", "tokens", "degree", "batch"):
        if getattr(row, name) is not None or name in ("frames", "degree", "batch"):
            _check_positive(f"{where}.{name}", getattr(row, name))
    _check_variation(row.cv, f"{where}.cv")


def _check_seconds(value: object, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not MIN_TIME_S <= value <= MAX_TIME_S:
        raise ProfileError(
            f"{name} is {shown(value)}; it must be a number of seconds from {MIN_TIME_S:g} to {MAX_TIME_S:g}"
        )


def _check_variation(value: object, name: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_VARIATION:
        raise ProfileError(f"{name} is {shown(value)}; it must be null or a number from 0 to {MAX_VARIATION:g}")


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ProfileError(f"{name} is {shown(value)}; it must be a whole number of at least 1")
    if value > _MAX_COUNT:
        raise ProfileError(f"{name} is {shown(value)}; it must be at most {_MAX_COUNT}")
