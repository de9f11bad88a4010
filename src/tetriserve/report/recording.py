"""Writes what happens in a comparison to files while it happens."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from tetriserve.core.errors import ConfigError
from tetriserve.workload.outcome import Outcome
from tetriserve.workload.perfetto import chrome_trace


class Recorder:
    """Takes outcomes of several runs.

    out: a result file (JSON Lines) of all runs, each line with its `policy` and `workload_seed`.
    trace_out: a trace of the first run only.

    Raises:
        ConfigError: a file cannot be written; said before anything runs.
    """

    def __init__(self, out: Path | None, trace_out: Path | None, *, num_ranks: int) -> None:
        self._out = _open(out)
        self._trace_out = _open(trace_out)
        self._num_ranks = num_ranks
        self._first: tuple[str, int] | None = None
        self._traced: list[Outcome] = []

    def take(self, policy: str, seed: int, outcome: Outcome) -> None:
        if self._out is not None:
            line = {"policy": policy, "workload_seed": seed, **outcome.as_json()}
            self._out.write(json.dumps(line, allow_nan=False) + "\n")
        if self._trace_out is not None:
            self._first = self._first or (policy, seed)
            if self._first == (policy, seed):
                self._traced.append(outcome)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._trace_out is not None:
            if kind is None and self._first is not None:
                title = f"{self._first[0]}, seed {self._first[1]}"
                json.dump(chrome_trace(self._traced, self._num_ranks, title), self._trace_out)
            self._trace_out.close()
        if self._out is not None:
            self._out.close()


def _open(path: Path | None) -> TextIO | None:
    try:
        return None if path is None else path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
