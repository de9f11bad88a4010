"""How every figure looks: one colour, marker and line per policy, wherever it appears.

Colours are those of M. Okabe and K. Ito ("Color Universal Design"), which people with any common colour vision tell
apart; markers and dashes carry the same distinction in greyscale. Text and lines that belong to no policy use three
inks, which the page replaces by its own, so that one drawing serves a light and a dark page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#1c2024", "#676d74", "#d9dce0"
PNG_DPI = 160
REM_PER_INCH = 7.2
"""Size of a figure on a page; of one size for all, text has one size."""

Dash = str | tuple[int, tuple[int, ...]]

_VERMILION, _BLUE, _GREEN, _PURPLE, _ORANGE, _SKY, _GREY = (
    "#d55e00", "#0077bb", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a3a9b0",
)  # fmt: skip
_DASHES: tuple[Dash, ...] = ((0, (5, 2)), (0, (5, 1, 1, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How a policy is drawn. `is_featured` ones are thick, with a band for the 95 % confidence interval."""

    colour: str
    marker: str
    dash: Dash = "-"
    is_featured: bool = False
    marker_colour: str = ""
    marker_size: float = 4.5

    @property
    def line(self) -> dict[str, Any]:
        """As keyword arguments of `Axes.plot`."""
        return {
            "color": self.colour,
            "linestyle": self.dash,
            "linewidth": 2.0 if self.is_featured else 1.3,
            "marker": self.marker,
            "markersize": self.marker_size,
            "markeredgecolor": self.marker_colour or self.colour,
            "markerfacecolor": self.marker_colour or self.colour,
            "markeredgewidth": 0.5 if self.marker_colour else 1.0,
            "zorder": 3 if self.is_featured else 2.5,
        }


BOUND = Look(colour=INK, marker="", dash=(0, (4, 2)))

_LOOKS = {
    "tetriserve": Look(colour=_VERMILION, marker="o", is_featured=True),
    "lookahead": Look(colour=_BLUE, marker="D", is_featured=True),
    "exhaustive": Look(colour="#332288", marker="*"),
    "rssp": Look(colour=_GREEN, marker="s", dash=_DASHES[0]),
    "edf-best-fit": Look(colour=_PURPLE, marker="^", dash=_DASHES[1]),
    "edf": Look(colour=_ORANGE, marker="v", dash=_DASHES[1]),
    "srtf": Look(colour=_SKY, marker="P", dash=_DASHES[3]),
    "disaggregate": Look(colour="#661100", marker="d", dash=_DASHES[1]),
    "sjf": Look(colour="#a6761d", marker="X", dash=_DASHES[3]),
    "fcfs": Look(colour=_GREY, marker="x", dash=_DASHES[2]),
}
_OTHERS = tuple(
    Look(colour=colour, marker=marker, is_featured=True)
    for colour, marker in (("#882255", "p"), ("#44aa99", "h"), ("#999933", "<"), ("#aa4499", ">"))
)


def look_of(policy: str) -> Look:
    """The look that `policy` has in every figure of every report.

    Fixed degrees are grey with their number as marker. Settings after the colon change the dash, never the colour. A
    policy from elsewhere gets one of the remaining looks, the same one every time.
    """
    name, _, argument = policy.partition(":")
    if name == "fixed":
        return Look(colour=_GREY, marker=f"${argument}$", dash=_DASHES[2], marker_colour=INK, marker_size=5.5)
    look = _LOOKS.get(name) or _OTHERS[crc32(name.encode()) % len(_OTHERS)]
    if not argument:
        return look
    dash = _DASHES[crc32(argument.encode()) % len(_DASHES)]
    return Look(colour=look.colour, marker=look.marker, dash=dash)


@contextmanager
def styled() -> Iterator[None]:
    """Figures made in here have the house style."""
    import matplotlib as mpl

    with mpl.rc_context(
        {
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.titlecolor": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": MUTED,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": RULE,
            "grid.linewidth": 0.7,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "text.color": INK,
            "legend.frameon": False,
            "legend.handlelength": 2.6,
            "hatch.linewidth": 0.8,
            "figure.facecolor": "white",
        }
    ):
        yield


def canvas(width_in: float, height_in: float) -> Figure:
    """An empty figure, in no global state; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), layout="constrained")


def save_png(figure: Figure, path: Path) -> None:
    """On white, whatever the page.

    Raises:
        OSError: `path` cannot be written.
    """
    figure.savefig(path, format="png", dpi=PNG_DPI, metadata={"Software": None})


def as_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element to be put into a page, without references to anything outside of it.

    Its inks are the page's variables `--ink`, `--muted` and `--rule`; its text uses the page's font.

    Args:
        name: unlike that of any other figure on the page: inner references start with it.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    width_in = figure.get_size_inches()[0]
    svg = svg.replace("<svg", f'<svg style="max-width: {REM_PER_INCH * width_in:.1f}rem"', 1)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, count=2)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # the same in every figure, and referred to by none
    for ink, variable in ((INK, "--ink"), (MUTED, "--muted"), (RULE, "--rule")):
        svg = svg.replace(ink, f"var({variable})")
    return svg
