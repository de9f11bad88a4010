"""Exhibits as one HTML page that needs nothing but itself: drawings, numbers and style are inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from tetriserve.core.errors import ConfigError
from tetriserve.report.exhibit import Exhibit, Sheet
from tetriserve.report.style import as_svg

_MAX_OPEN_ROWS = 15


def render_page(title: str, introduction: Sequence[str], exhibits: Sequence[Exhibit]) -> str:
    """The document. Every string is escaped.

    Args:
        introduction: paragraphs under the title.
    """
    template = Template(files("tetriserve.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        introduction="\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in introduction),
        contents="\n".join(f'<li><a href="#{escape(e.name)}">{escape(e.title)}</a></li>' for e in exhibits),
        sections="\n".join(map(_section, exhibits)),
    )


def reserve_page(path: Path) -> None:
    """Find out whether a page can be written there, before the work that it takes. What is there stays.

    Raises:
        ConfigError: `path` cannot be written.
    """
    with one_line_error(path), path.open("a"):
        pass


def write_page(page: str, path: Path) -> None:
    """Replaces what is there.

    Raises:
        ConfigError: `path` cannot be written.
    """
    with one_line_error(path):
        path.write_text(page, encoding="utf-8")


@contextmanager
def one_line_error(path: Path) -> Iterator[None]:
    """Says which path cannot be written, as a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _section(exhibit: Exhibit) -> str:
    parts = [
        f'<section id="{escape(exhibit.name)}">',
        f"<h2>{escape(exhibit.title)}</h2>",
        f"<p>{escape(exhibit.caption)}</p>",
    ]
    if exhibit.figure is not None:
        # The caption above says what a figure shows, and its numbers are below it as a table.
        svg = as_svg(exhibit.figure, exhibit.name).replace(
            "<svg", f'<svg role="img" aria-label="{escape(exhibit.title)}"', 1
        )
        parts.append(f"<figure>{svg}</figure>")
    if not exhibit.is_long:
        numbers = f'<div class="numbers" tabindex="0">{_table(exhibit.sheet, exhibit.title)}</div>'
        is_open = " open" if exhibit.figure is None or len(exhibit.sheet.rows) <= _MAX_OPEN_ROWS else ""
        parts.append(f"<details{is_open}><summary>Numbers</summary>{numbers}</details>")
    parts += [f'<p class="command"><code>{escape(exhibit.command)}</code></p>', "</section>"]
    return "\n".join(parts)


def _table(sheet: Sheet, name: str) -> str:
    is_word = [any(isinstance(row[index], str) for row in sheet.rows) for index in range(len(sheet.columns))]
    kinds = [' class="word"' if word else "" for word in is_word]
    heads = "".join(
        f'<th scope="col"{kind}>{escape(column.heading)}</th>'
        for column, kind in zip(sheet.columns, kinds, strict=True)
    )
    body = "\n".join(
        "<tr>"
        + "".join(
            f"<td{kind}>{escape(column.show(cell))}</td>"
            for cell, column, kind in zip(row, sheet.columns, kinds, strict=True)
        )
        + "</tr>"
        for row in sheet.rows
    )
    return f'<table aria-label="{escape(name)}"><thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'
