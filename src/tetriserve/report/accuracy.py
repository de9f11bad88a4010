"""How many denoise steps a picture needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tetriserve.report.style import canvas, save_png, styled

_COLOURS = ("#0077bb", "#d55e00", "#009e73")
_MARKERS = ("o", "D", "s")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1)))


def save_accuracy_curve(curves: Mapping[tuple[str, int], Sequence[tuple[int, float]]], path: Path) -> None:
    """Percentage of pictures with the right objects over the number of steps, as PNG.

    curves: points (steps, percentage) by size and number of objects; a colour for each number, a dash for each size.

    Raises:
        OSError: `path` cannot be written.
    """
    sizes = list(dict.fromkeys(size for size, _ in curves))
    with styled():
        figure = canvas(6.4, 3.6)
        axes = figure.add_subplot()
        for (size, num_objects), points in curves.items():
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(
                xs, ys, label=f"{size}, {num_objects} object{'s' * (num_objects > 1)}",
                color=_COLOURS[num_objects - 1], marker=_MARKERS[num_objects - 1],
                linestyle=_DASHES[sizes.index(size) % len(_DASHES)], markersize=4,
            )  # fmt: skip
        ticks = sorted({steps for points in curves.values() for steps, _ in points})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(0, 102)
        axes.set(xlabel="denoise steps", ylabel="pictures with the right objects, %")
        axes.legend(loc="lower right")
        save_png(figure, path)
