"""The profile file: versioned JSON with units in its names, validated in full before anything uses it.

```
{"format": "tetriserve-profile/1", "model": ..., "fingerprint": ..., "hardware": ..., "dtype": ...,
 "source": ..., "created": "2026-11-20", "doubt": "",
 "encode_s": 0.02, "switch_s": 0.001, "move_s": 0.001,
 "denoise": [{"height", "width", "frames", "tokens", "degree", "batch", "step_s", "cv"}, ...],
 "decode": [{"height", "width", "frames", "decode_s"}, ...]}
```
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from tetriserve.core.bounds import shown
from tetriserve.core.errors import ConfigError, ProfileError
from tetriserve.core.request import Shape
from tetriserve.files import read_text

FORMAT = "tetriserve-profile/1"
MIN_TIME_S, MAX_TIME_S = 1e-6, 1e4
"""Of a stage, or a step: what is outside is a slip of the pen, and a simulation of it does not end."""
MAX_VARIATION = 1000.0
_MAX_BYTES = 2**24
_MAX_COUNT = 2**31

_Row = TypeVar("_Row", "DenoiseRow", "DecodeRow")


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiseRow:
    """Seconds of one denoise step. `cv` is the coefficient of variation of the measurement, None where unknown."""

    height: int
    width: int
    tokens: int
    degree: int
    step_s: float
    frames: int = 1
    batch: int = 1
    cv: float | None = None

    @property
    def shape(self) -> Shape:
        return Shape(self.height, self.width, self.frames)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRow:
    """Seconds to turn one request's latents into pixels on one rank."""

    height: int
    width: int
    decode_s: float
    frames: int = 1

    @property
    def shape(self) -> Shape:
        return Shape(self.height, self.width, self.frames)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One model on one kind of hardware.

    switch_s: seconds to start any task; move_s: on top of that, to start one on other ranks than the request's last;
        0 where nobody measured it, or where there is only one rank.
    fingerprint: ties it to an architecture; empty means any.
    doubt: why its times may be too long; empty if nothing is known against them.
    """

    model: str
    hardware: str
    dtype: str
    source: str
    created: str
    encode_s: float
    switch_s: float
    denoise: tuple[DenoiseRow, ...]
    decode: tuple[DecodeRow, ...]
    fingerprint: str = ""
    move_s: float = 0.0
    doubt: str = ""

    def __post_init__(self) -> None:
        if not self.denoise or not self.decode:
            raise ProfileError("profile has no denoise rows" if not self.denoise else "profile has no decode rows")
        for name, seconds in (("encode_s", self.encode_s), ("switch_s", self.switch_s)):
            _check_seconds(seconds, name)
        if self.move_s != 0:
            _check_seconds(self.move_s, "move_s")
        for number, row in enumerate(self.denoise):
            _check_seconds(row.step_s, f"denoise[{number}].step_s")
            _check_positive(f"denoise[{number}]", row, ("height", "width", "frames", "tokens", "degree", "batch"))
            _check_variation(row.cv, f"denoise[{number}].cv")
        for number, decode_row in enumerate(self.decode):
            _check_seconds(decode_row.decode_s, f"decode[{number}].decode_s")
            _check_positive(f"decode[{number}]", decode_row, ("height", "width", "frames"))
        keys = [(row.shape, row.degree, row.batch) for row in self.denoise]
        if len(set(keys)) < len(keys):
            shape, degree, batch = next(key for key in keys if keys.count(key) > 1)
            raise ProfileError(f"profile has two denoise rows for {shape} at degree {degree}, batch {batch}")
        decoded = [decode_row.shape for decode_row in self.decode]
        if len(set(decoded)) < len(decoded):
            twice = next(shape for shape in decoded if decoded.count(shape) > 1)
            raise ProfileError(f"profile has two decode rows for {twice}")
        smallest, largest = min(decoded, key=_pixels), max(decoded, key=_pixels)
        for shape in self.shapes:
            if not smallest.num_pixels <= shape.num_pixels <= largest.num_pixels:
                raise ProfileError(
                    f"profile has no decode row that covers {shape}; they go from {smallest} to {largest}"
                )

    @property
    def degrees(self) -> tuple[int, ...]:
        return tuple(sorted({row.degree for row in self.denoise}))

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Measured shapes, smallest first."""
        return tuple(sorted({row.shape for row in self.denoise}, key=_pixels))


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
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise ProfileError(f"format is {found!r}; this version reads {FORMAT!r}")
    rest = {key: value for key, value in document.items() if key != "format"}
    for name in ("denoise", "decode"):
        if not isinstance(rest.get(name), list):
            raise ProfileError(f"{name} must be a list of rows")
    rest["denoise"] = tuple(_row(DenoiseRow, row, f"denoise[{i}]") for i, row in enumerate(rest["denoise"]))
    rest["decode"] = tuple(_row(DecodeRow, row, f"decode[{i}]") for i, row in enumerate(rest["decode"]))
    _check_names(Profile, rest, "profile")
    for name in ("model", "hardware", "dtype", "source", "created", "fingerprint", "doubt"):
        if not isinstance(rest.get(name, ""), str):
            raise ProfileError(f"{name} must be a string")
    return Profile(**rest)


def _row(kind: type[_Row], row: object, where: str) -> _Row:
    if not isinstance(row, dict):
        raise ProfileError(f"{where} must be an object")
    _check_names(kind, row, where)
    return kind(**row)


def _check_names(kind: type[Any], values: dict[str, Any], where: str) -> None:
    known = {field.name for field in fields(kind)}
    required = {field.name for field in fields(kind) if field.default is MISSING}
    if unknown := sorted(values.keys() - known):
        raise ProfileError(f"{where} has the unknown field {unknown[0]!r}")
    if missing := sorted(required - values.keys()):
        raise ProfileError(f"{where} lacks the field {missing[0]!r}")


def _pixels(shape: Shape) -> int:
    return shape.num_pixels


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


def _check_positive(where: str, row: object, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(row, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ProfileError(f"{where}.{name} is {shown(value)}; it must be a whole number of at least 1")
        if value > _MAX_COUNT:
            raise ProfileError(f"{where}.{name} is {shown(value)}; it must be at most {_MAX_COUNT}")
