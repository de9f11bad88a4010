"""One file, nothing from elsewhere, nothing that a name could break."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tetriserve.core.errors import ConfigError
from tetriserve.report.exhibit import Column, Exhibit, Sheet
from tetriserve.report.page import render_page, reserve_page
from tetriserve.report.style import canvas

EVIL = "<script>alert('x') & \"y\"</script>"


def exhibit(name: str = "one", *, with_figure: bool = False, num_rows: int = 1, is_long: bool = False) -> Exhibit:
    figure = canvas(4, 3) if with_figure else None
    if figure is not None:
        figure.add_subplot().set_title(EVIL)
    return Exhibit(
        name=name,
        title=EVIL,
        caption=EVIL,
        command=EVIL,
        sheet=Sheet((Column(EVIL), Column("SAR", ".2f")), ((EVIL, 0.125), ("none", None)) * num_rows),
        figure=figure,
        is_long=is_long,
    )


class Tags(HTMLParser):
    """Every opening tag and its attributes; complains about tags that close in another order."""

    VOID = ("meta", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def test_everything_is_escaped_and_closed() -> None:
    page = render_page(EVIL, [EVIL], [exhibit("one", with_figure=True), exhibit("two")])
    tags = Tags(page).found
    assert "script" not in {tag for tag, _ in tags}
    assert page.count("&lt;script&gt;") >= 10
    labels = [attributes["aria-label"] for tag, attributes in tags if tag in ("svg", "table")]
    assert labels == [EVIL] * 3


def test_nothing_comes_from_outside_and_every_address_exists() -> None:
    page = render_page("t", ["i"], [exhibit("one", with_figure=True), exhibit("two", with_figure=True)])
    assert "http" not in page
    assert "@import" not in page
    tags = Tags(page).found
    assert not {tag for tag, _ in tags} & {"link", "script", "img", "iframe"}
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for _, attributes in tags if "href" in attributes]
    assert {"#one", "#two"} <= set(links)
    assert {str(link).removeprefix("#") for link in links} <= set(ids)


def test_it_follows_the_readers_light_or_dark() -> None:
    page = render_page("t", [], [exhibit()])
    assert "prefers-color-scheme: dark" in page
    assert set(re.findall(r"var\((--\w+)\)", page)) <= set(re.findall(r"(--\w+):", page))


def test_cells_are_rounded_and_missing_ones_empty() -> None:
    page = render_page("t", [], [exhibit()])
    assert "<td>0.12</td>" in page
    assert "<td></td>" in page


def test_tables_are_open_but_for_long_ones_under_a_figure_and_those_for_programs_are_left_out() -> None:
    assert "<details open>" in render_page("t", [], [exhibit(num_rows=20)])
    assert "<details open>" in render_page("t", [], [exhibit(with_figure=True)])
    assert "<details>" in render_page("t", [], [exhibit(with_figure=True, num_rows=20)])
    assert "<table" not in render_page("t", [], [exhibit(is_long=True)])


def test_a_page_that_cannot_be_written_is_said_and_one_that_exists_is_kept_until_then(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"/nowhere/p\.html cannot be written: No such file or directory"):
        reserve_page(Path("/nowhere/p.html"))
    (tmp_path / "p.html").write_text("old")
    reserve_page(tmp_path / "p.html")
    assert (tmp_path / "p.html").read_text() == "old"
