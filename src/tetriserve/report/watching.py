"""A bench run while it goes on: one line on the terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tetriserve.bench.tally import Tally
from tetriserve.workload.percentiles import percentile


class Watch:
    """A bar of what was sent and counts of what became of it; silent where the console is no terminal.

    Drawn only when told, never by a thread of its own, which would make sends late.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line about the preparation, which replaces the last one."""
        self._progress.update(self._task, description=text, refresh=True)

    def warn(self, text: str) -> None:
        """A line that stays, on any console."""
        self._progress.console.print(text, markup=False, soft_wrap=True)

    def show(self, tally: Tally, elapsed_s: float) -> None:
        if not self._progress.disable:
            self._progress.update(
                self._task,
                total=tally.total,
                completed=tally.num_sent,
                description=describe(tally, elapsed_s),
                refresh=True,
            )


def describe(tally: Tally, elapsed_s: float) -> str:
    """`12 s: sent 40/300, running 3, done 36, failed 1, attained 0.944, p50 1.20 s, p99 3.40 s`."""
    words = [f"sent {tally.num_sent}/{tally.total}", f"running {tally.num_running}", f"done {tally.num_finished}"]
    if tally.num_failed:
        words.append(f"failed {tally.num_failed}")
    if ended := tally.num_finished + tally.num_failed:
        words.append(f"attained {tally.num_attained / ended:.3f}")
    if tally.latencies_s:
        words += [f"p{percent} {percentile(tally.latencies_s, percent):.2f} s" for percent in (50, 99)]
    return f"{max(0.0, elapsed_s):.0f} s: {', '.join(words)}"
