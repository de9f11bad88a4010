"""A figure with its numbers and its words: what a report is made of."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tetriserve.core.request import Shape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tetriserve.simulator.comparison import Comparison

Cell: TypeAlias = str | float | None

UPPER_BOUND = "upper bound"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a sheet. `form` is the format in which people read its numbers."""

    heading: str
    form: str = ""

    def show(self, cell: Cell) -> str:
        if cell is None or (isinstance(cell, float) and math.isnan(cell)):
            return ""
        return cell if isinstance(cell, str) else format(cell, self.form)


@dataclass(frozen=True, slots=True)
class Sheet:
    """Numbers in rows and columns; None and NaN are empty cells."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def save_csv(self, path: Path) -> None:
        """Unrounded.

        Raises:
            OSError: `path` cannot be written.
        """
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([column.heading for column in self.columns])
            writer.writerows(["" if isinstance(c, float) and math.isnan(c) else c for c in row] for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhibit:
    """One part of a report.

    name: of its files, and its address on the page.
    caption: what it shows, in a sentence or a few.
    command: one that prints some of its numbers again.
    is_long: the sheet is for programs; the page leaves it out.
    """

    name: str
    title: str
    caption: str
    command: str
    sheet: Sheet
    figure: Figure | None = None
    is_long: bool = False


def comparison_sheet(keys: Sequence[Column], comparisons: Sequence[tuple[tuple[Cell, ...], Comparison]]) -> Sheet:
    """One row per comparison and policy, and one for the upper bound: SAR, SAR of each model and size, latencies, GPU
    time.

    Args:
        keys: columns that tell the comparisons apart, in front of the others; each comparison brings its cells.
    """
    shapes = sorted(
        {shape for _, comparison in comparisons for result in comparison.results for shape in result.sar_by_shape},
        key=lambda shape: (shape.num_pixels, shape),
    )
    models = list(dict.fromkeys(model for _, comparison in comparisons for model in comparison.models))
    columns = (
        *keys,
        Column("policy"),
        Column("SAR", ".3f"),
        Column("± 95 %", ".3f"),
        *(Column(f"SAR {model}", ".3f") for model in models),
        *(Column(f"SAR {shape}", ".3f") for shape in shapes),
        Column("mean s", ".2f"),
        Column("p50 s", ".2f"),
        Column("p99 s", ".2f"),
        Column("GPU s", ".0f"),
    )
    rows = [row for cells, comparison in comparisons for row in _rows(cells, comparison, models, shapes)]
    return Sheet(columns, tuple(rows))


def _rows(
    cells: tuple[Cell, ...], comparison: Comparison, models: Sequence[str], shapes: Sequence[Shape]
) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = [
        (
            *cells,
            result.policy,
            result.sar,
            result.sar_half_width,
            *(result.sar_by_model.get(model) for model in models),
            *(result.sar_by_shape.get(shape) for shape in shapes),
            result.mean_latency_s,
            result.p50_latency_s,
            result.p99_latency_s,
            result.gpu_time_s,
        )
        for result in comparison.results
    ]
    if comparison.bound is not None:
        by_model = comparison.bound_by_model or {}
        bounds = (comparison.bound, None, *map(by_model.get, models))
        rows.append((*cells, UPPER_BOUND, *bounds, *[None] * (len(shapes) + 4)))
    return rows
