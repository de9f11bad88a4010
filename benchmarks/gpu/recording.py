"""Rows of figures that are on disk as soon as they are known, time limits for sections, and a table at the end.

The scripts in this folder run on machines that may be taken away at any moment: what was measured until then counts.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 80
_GRACE_S = 20.0
"""After the limit of the whole run, for a section that a signal does not interrupt, stuck in a driver."""
_LIBRARIES = ("torch", "diffusers", "transformers", "triton", "torchao", "cuda-bindings")


class OutOfTime(BaseException):
    """A section has used up its time. No `Exception`: what a section catches of its rows must not catch this."""


class Recording:
    """Writes rows to `path` and prints them at the end, as tables of rows with the same figures.

    only: names of the sections that run; empty: all.
    limit_s: of the whole run; sections that would begin after it are left out.
    """

    def __init__(self, path: Path, limit_s: float, only: Sequence[str] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._rows: list[dict[str, Any]] = []
        self._only = only
        self._ends_at = time.monotonic() + limit_s
        self._section = "machine"
        faulthandler.dump_traceback_later(limit_s + _GRACE_S, exit=True)
        signal.signal(signal.SIGALRM, _raise_out_of_time)

    def row(self, case: str, **figures: object) -> None:
        """Put down one row of the present section. Figures are numbers, or texts such as the reason of an error."""
        line = {"section": self._section, "case": case, **figures}
        self._rows.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        print(f"{self._section}: {case}: {_words(figures)}", file=sys.stderr, flush=True)

    def enter(self, name: str) -> None:
        """The next rows are of section `name`, which has no limit of its own."""
        self._section = name

    @contextmanager
    def section(self, name: str, limit_s: float) -> Iterator[bool]:
        """Gives whether the section shall run. An error ends the section, with a row that says so, and not the run."""
        self.enter(name)
        left_s = min(limit_s, self._ends_at - time.monotonic())
        if self._only and name not in self._only:
            yield False
            return
        if left_s <= 0:
            self.row("section", skipped="no time is left")
            yield False
            return
        started_at = time.monotonic()
        try:
            signal.setitimer(signal.ITIMER_REAL, left_s)
            yield True
        except OutOfTime:
            self.row("section", error=f"ended after its {left_s:.3g} s")
        except Exception as error:  # the other sections may still tell something
            self.row("section", error=one_line(error))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.row("section", took_s=round(time.monotonic() - started_at, 2))

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """An error ends the case, with a row that says so, and not the section."""
        try:
            yield
        except Exception as error:
            self.row(name, error=one_line(error))

    def end(self) -> None:
        """Print the tables."""
        faulthandler.cancel_dump_traceback_later()
        console = Console(width=WIDTH, highlight=False, markup=False)
        for section in dict.fromkeys(row["section"] for row in self._rows):
            console.print(f"[{section}]")
            rows = [row for row in self._rows if row["section"] == section]
            by_figures = groupby(rows, key=lambda row: tuple(key for key in row if key not in _HEADS))
            for figures, alike in by_figures:
                _print_rows(console, figures, [*alike])
        self._file.close()


_HEADS = ("section", "case")


def _print_rows(console: Console, figures: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Rows that have the same figures: a table, unless there is one row or there are texts."""
    if len(rows) == 1 or any(isinstance(rows[0][key], str) for key in figures):
        for row in rows:
            console.print(f"{row['case']}: {_words({key: row[key] for key in figures})}")
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("case", overflow="fold")
    for key in figures:
        table.add_column(key.replace("_", " "), justify="right", overflow="fold")
    for row in rows:
        table.add_row(row["case"], *(_figure(row[key]) for key in figures))
    console.print(table)


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _words(figures: dict[str, object]) -> str:
    return ", ".join(f"{key} {_figure(value)}" for key, value in figures.items())


def _raise_out_of_time(number: int, frame: object) -> None:
    raise OutOfTime


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def add_options(parser: ArgumentParser, name: str) -> None:
    """What the scripts have in common."""
    parser.add_argument("--dry-run", action="store_true", help="tiny configurations on the CPU, to see that all runs")
    parser.add_argument("--out", type=Path, default=Path(f"out/gpu/{name}.jsonl"), help="file that rows are added to")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="run these sections alone")


def begin(options: Namespace, limit_s: float) -> Recording:
    """A recording whose first row names the machine, the libraries, and the date."""
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = "absent"
    recording = Recording(options.out, limit_s, options.only)
    recording.row(
        "this",
        hardware="CPU, a dry run" if options.dry_run else gpu_words(),
        host=f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}",
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        libraries=", ".join(f"{library} {version}" for library, version in versions.items()),
        command=" ".join(sys.argv),
    )
    return recording


def gpu_words() -> str:
    """The GPUs of this machine as the driver's own tool names them, with driver and memory."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return "; ".join(
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise SystemExit(f"no GPU can be asked for ({one_line(error)}); use --dry-run") from None


def median(values: Sequence[float], scale: float = 1.0) -> float:
    """Rounded to four digits, which is more than any of these measurements holds."""
    return float(f"{statistics.median(values) * scale:.4g}")
