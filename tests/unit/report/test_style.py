"""Every policy keeps its look; a drawing for a page refers to nothing outside of it."""

from __future__ import annotations

import re

from tetriserve.policies.registry import POLICIES
from tetriserve.report.style import INK, as_svg, canvas, look_of, styled


def distance(one: str, other: str) -> float:
    """Between two colours, by the weights of the eye, from 0 to 255."""
    channels = [(int(one[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return sum(w * abs(a - b) for w, (a, b) in zip((0.3, 0.59, 0.11), channels, strict=True))


def test_registered_policies_differ_in_colour_and_marker() -> None:
    looks = {name: look_of(name) for name in POLICIES if name not in ("fixed", "fcfs")}
    assert len({look.colour for look in looks.values()}) == len(looks)
    assert len({look.marker for look in looks.values()}) == len(looks)
    assert look_of("fcfs").marker not in {look.marker for look in looks.values()}
    assert distance(look_of("tetriserve").colour, look_of("lookahead").colour) > 60


def test_fixed_degrees_are_grey_and_numbered() -> None:
    assert look_of("fixed:2").colour == look_of("fixed:8").colour
    assert [look_of(f"fixed:{degree}").marker for degree in (1, 8)] == ["$1$", "$8$"]


def test_settings_keep_the_colour_and_change_the_dash() -> None:
    plain, other = look_of("tetriserve"), look_of("tetriserve:fill=off")
    assert other.colour == plain.colour
    assert other.dash != plain.dash


def test_a_policy_from_elsewhere_has_one_look_that_no_registered_policy_has() -> None:
    look = look_of("mine")
    assert look == look_of("mine")
    assert look.colour not in {look_of(name).colour for name in POLICIES}
    assert look.is_featured


def test_a_drawing_uses_the_pages_inks_and_refers_only_to_itself() -> None:
    with styled():
        figure = canvas(4, 3)
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], marker="o", color=INK, label="a & b")
        axes.legend()
        svg = as_svg(figure, "name")
    assert svg.startswith("<svg")
    assert INK not in svg
    assert "var(--ink)" in svg
    assert "a &amp; b" in svg  # text stays text
    assert "http" not in svg
    ids = set(re.findall(r' id="([^"]+)"', svg))
    assert set(re.findall(r'href="#([^"]+)"', svg)) <= ids
    assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= ids
    with styled():
        assert as_svg(figure, "name") == svg
        assert ids.isdisjoint(re.findall(r' id="([^"]+)"', as_svg(figure, "other")))
