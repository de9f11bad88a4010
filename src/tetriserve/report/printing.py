"""Results on stdout."""

from __future__ import annotations

from rich.console import Console, RenderableType

_WIDTH_OF_FILES = 160


def print_table(*parts: RenderableType) -> None:
    """Print on stdout, as wide as the terminal; wide enough for every column where there is none."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH_OF_FILES)
    for part in parts:
        console.print(part)
