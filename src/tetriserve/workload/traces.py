"""Recorded requests as CSV (with a header) or JSON Lines: read, written, replayed.

Fields: arrival_s, height, width (needed); model (needed where several share the pool), frames, num_steps, slo_ms, seed,
priority, request_id, prompt (optional).
`slo_ms` is the time from arrival to deadline. A result file of `tetriserve simulate --out` or of a live run is a trace
too: it says `deadline_s` where a trace says `slo_ms`, and what became of each request is left out.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tetriserve.core.bounds import MAX_REQUESTS, MAX_SEED, MAX_STEPS, shown
from tetriserve.core.errors import ConfigError
from tetriserve.core.request import MAX_SIDE, Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.files import read_text
from tetriserve.workload.slo import DeadlineRule

_NEEDED = ("arrival_s", "height", "width")
_OPTIONAL = ("model", "frames", "num_steps", "slo_ms", "seed", "priority", "request_id", "prompt")
_WRITTEN = ("request_id", "arrival_s", "height", "width", "frames", "num_steps", "slo_ms", "seed", "priority")
_LINES_SUFFIXES = (".jsonl", ".ndjson")

_MAX_BYTES = 2**28
_MAX_TIME_S = 1e8
_MAX_FRAMES = 100_000
_MAX_PRIORITY = 1_000_000

Row = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Steps:
    """Denoise steps of a request that names none, and passes of the model in each step of any request."""

    number: int
    num_passes: int = 1


def load_trace(path: Path, *, default_steps: int | Mapping[str, Steps], deadlines: DeadlineRule) -> list[Request]:
    """The trace's requests in order of arrival.

    Args:
        default_steps: denoise steps of a request that names none, or what is to be known of each model by its key. The
            empty key, and a plain number, stand for the model of requests that name none.
        deadlines: the rule for a request without `slo_ms`.

    Raises:
        ConfigError: unreadable, neither .csv nor .jsonl, empty, or a malformed line; the message names its number.
    """
    text = read_text(path, "trace", _MAX_BYTES)
    if path.suffix in _LINES_SUFFIXES:
        rows = _read_lines(path, text)
    elif path.suffix == ".csv":
        rows = _read_csv(path, text)
    else:
        raise ConfigError(f"trace {path}: the name must end in .csv, {' or '.join(_LINES_SUFFIXES)}")
    by_model = {"": Steps(default_steps)} if isinstance(default_steps, int) else default_steps
    requests: list[Request] = []
    numbers_of_ids: dict[str, int] = {}
    for number, row in rows:
        if len(requests) == MAX_REQUESTS:
            raise ConfigError(f"trace {path} has more than {MAX_REQUESTS} requests; split it")
        try:
            request = _request(row, f"r{len(requests)}", by_model, deadlines)
            if request.request_id in numbers_of_ids:
                raise ValueError(f"request_id {request.request_id!r} is line {numbers_of_ids[request.request_id]}'s")
        except ValueError as error:
            raise ConfigError(f"trace {path}, line {number}: {error}") from error
        numbers_of_ids[request.request_id] = number
        requests.append(request)
    if not requests:
        raise ConfigError(f"trace {path} has no requests")
    return sorted(requests, key=lambda request: request.arrival_s)


def save_trace(requests: Iterable[Request], path: Path) -> None:
    """Write requests so that `load_trace` gives them back; prompts are left out.

    Raises:
        ConfigError: the name ends in neither .csv nor .jsonl.
    """
    rows = [_row(request) for request in requests]
    if path.suffix in _LINES_SUFFIXES:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            has_models = any("model" in row for row in rows)
            writer = csv.DictWriter(file, (*_WRITTEN, "model") if has_models else _WRITTEN)
            writer.writeheader()
            writer.writerows(rows)
    else:
        raise ConfigError(f"trace {path}: the name must end in .csv, {' or '.join(_LINES_SUFFIXES)}")


def _row(request: Request) -> dict[str, object]:
    return {
        "request_id": request.request_id,
        "arrival_s": request.arrival_s,
        "height": request.shape.height,
        "width": request.shape.width,
        "frames": request.shape.frames,
        "num_steps": request.num_steps,
        "slo_ms": (request.deadline_s - request.arrival_s) * 1000,
        "seed": request.seed,
        "priority": request.priority,
        **({"model": request.model} if request.model else {}),
    }


def _read_lines(path: Path, text: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"trace {path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"trace {path}, line {number}: must be an object with {', '.join(_NEEDED)}")
        yield number, row


def _read_csv(path: Path, text: str) -> Iterator[tuple[int, Row]]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        for cells in reader:
            if None in cells or None in cells.values():
                raise ConfigError(
                    f"trace {path}, line {reader.line_num}: the header has {len(reader.fieldnames or ())} columns, "
                    "this line does not"
                )
            yield reader.line_num, {name: value for name, value in cells.items() if value != ""}
    except csv.Error as error:
        raise ConfigError(f"trace {path}, line {reader.reader.line_num}: {error}") from error


def _request(row: Row, default_id: str, steps: Mapping[str, Steps], deadlines: DeadlineRule) -> Request:
    """
    Raises:
        ValueError: a field is missing, unknown or out of range.
    """
    is_result = "status" in row and "deadline_s" in row
    if missing := [name for name in _NEEDED if name not in row]:
        raise ValueError(f"{missing[0]} is missing")
    unknown = sorted(row.keys() - {*_NEEDED, *_OPTIONAL})
    if unknown and not is_result:
        raise ValueError(f"unknown field {unknown[0]!r}; allowed: {', '.join((*_NEEDED, *_OPTIONAL))}")
    model = _model(row, steps)
    arrival_s = _number(row, "arrival_s", 0.0, _MAX_TIME_S)
    request = Request(
        request_id=str(row.get("request_id", default_id)),
        prompt=str(row.get("prompt", "")),
        shape=Shape(
            _whole(row, "height", 1, MAX_SIDE),
            _whole(row, "width", 1, MAX_SIDE),
            _whole(row, "frames", 1, _MAX_FRAMES, default=1),
        ),
        stages=image_stages(
            _whole(row, "num_steps", 1, MAX_STEPS) if "num_steps" in row else steps[model].number,
            steps[model].num_passes,
        ),
        seed=_whole(row, "seed", 0, MAX_SEED, default=0),
        arrival_s=arrival_s,
        deadline_s=arrival_s,
        priority=_whole(row, "priority", -_MAX_PRIORITY, _MAX_PRIORITY, default=0),
        model=model,
    )
    if is_result:
        return replace(request, deadline_s=_number(row, "deadline_s", arrival_s, 2 * _MAX_TIME_S))
    slo_s = _number(row, "slo_ms", 0.0, _MAX_TIME_S * 1000) / 1000 if "slo_ms" in row else deadlines.slo_s(request)
    return replace(request, deadline_s=arrival_s + slo_s)


def _model(row: Row, known: Mapping[str, Steps]) -> str:
    model = row.get("model", "")
    if isinstance(model, str) and model in known:
        return model
    if list(known) == [""]:
        raise ValueError(f"model is {shown(model)}; there is one model here, which no request names")
    if model == "":
        raise ValueError(f"model is missing; it must be one of {', '.join(known)}")
    raise ValueError(f"model is {shown(model)}; it must be one of {', '.join(known)}")


def _number(row: Row, name: str, least: float, most: float) -> float:
    value = row[name]
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not least <= number <= most:
        raise ValueError(f"{name} is {shown(value)}; it must be a number from {least:g} to {most:g}")
    return number


def _whole(row: Row, name: str, least: int, most: int, default: int | None = None) -> int:
    value = row[name] if default is None else row.get(name, default)
    try:
        whole = int(value) if isinstance(value, int | str) and not isinstance(value, bool) else None
    except ValueError:
        whole = None
    if whole is None or not least <= whole <= most:
        raise ValueError(f"{name} is {shown(value)}; it must be a whole number from {least} to {most}")
    return whole
