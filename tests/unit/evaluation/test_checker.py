"""The checker reads pictures that it had no part in drawing: plain Pillow, at every size, clean and noisy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tetriserve.evaluation.reading import Found, read_image
from tetriserve.evaluation.vocabulary import COLOURS

Box = tuple[float, float, float, float]
Brush = Callable[[ImageDraw.ImageDraw, Box, tuple[int, int, int], tuple[int, int, int]], None]
SIZES = ((256, 256), (512, 512), (1024, 1024), (512, 256), (256, 512))


def polygon(*corners: tuple[float, float]) -> Brush:
    """Corners as fractions of the box."""

    def paint(draw: ImageDraw.ImageDraw, box: Box, colour: tuple[int, int, int], _: object) -> None:
        left, top, right, bottom = box
        draw.polygon([(left + x * (right - left), top + y * (bottom - top)) for x, y in corners], fill=colour)

    return paint


def circle(draw: ImageDraw.ImageDraw, box: Box, colour: tuple[int, int, int], _: object) -> None:
    draw.ellipse(box, fill=colour)


def ring(draw: ImageDraw.ImageDraw, box: Box, colour: tuple[int, int, int], background: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    rim = 0.22 * (right - left)
    draw.ellipse(box, fill=colour)
    draw.ellipse((left + rim, top + rim, right - rim, bottom - rim), fill=background)


def heart(draw: ImageDraw.ImageDraw, box: Box, colour: tuple[int, int, int], _: object) -> None:
    """Two discs over a triangle."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    for shift in (0.0, 0.46):
        draw.ellipse((left + shift * width, top, left + (shift + 0.54) * width, top + 0.56 * height), fill=colour)
    polygon((0.03, 0.38), (0.97, 0.38), (0.5, 1.0))(draw, box, colour, (0, 0, 0))


def star(draw: ImageDraw.ImageDraw, box: Box, colour: tuple[int, int, int], _: object) -> None:
    left, top, right, bottom = box
    x, y, radius = (left + right) / 2, top + 0.526 * (bottom - top), (right - left) / 1.902
    corners = [
        (
            x + radius * (0.42, 1.0)[k % 2 == 0] * math.sin(math.pi * k / 5),
            y - radius * (0.42, 1.0)[k % 2 == 0] * math.cos(math.pi * k / 5),
        )
        for k in range(10)
    ]
    draw.polygon(corners, fill=colour)


BRUSHES: dict[str, Brush] = {
    "circle": circle,
    "square": polygon((0, 0), (1, 0), (1, 1), (0, 1)),
    "triangle": polygon((0.5, 0.07), (1, 0.93), (0, 0.93)),
    "star": star,
    "heart": heart,
    "cross": polygon(
        (1 / 3, 0),
        (2 / 3, 0),
        (2 / 3, 1 / 3),
        (1, 1 / 3),
        (1, 2 / 3),
        (2 / 3, 2 / 3),
        (2 / 3, 1),
        (1 / 3, 1),
        (1 / 3, 2 / 3),
        (0, 2 / 3),
        (0, 1 / 3),
        (1 / 3, 1 / 3),
    ),  # fmt: skip
    "diamond": polygon((0.5, 0), (0.85, 0.5), (0.5, 1), (0.15, 0.5)),
    "ring": ring,
}


def paint(
    height: int,
    width: int,
    background: str,
    objects: Sequence[tuple[str, str, float, float, float]],
    noise: float = 0.0,
) -> np.ndarray:
    """Objects are (colour, shape, x, y, extent), in units of the shorter side."""
    image = Image.new("RGB", (width, height), COLOURS[background])
    draw, side = ImageDraw.Draw(image), min(height, width)
    for colour, shape, x, y, extent in objects:
        box = ((x - extent) * side, (y - extent) * side, (x + extent) * side, (y + extent) * side)
        BRUSHES[shape](draw, box, COLOURS[colour], COLOURS[background])
    pixels = np.asarray(image, dtype=np.float64)
    noisy = pixels + np.random.default_rng(0).normal(0.0, noise, pixels.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def names(objects: Sequence[Found]) -> list[tuple[str, str]]:
    return sorted((each.colour, each.shape) for each in objects)


@pytest.mark.parametrize("noise", [0.0, 20.0])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("shape", BRUSHES)
def test_every_shape_is_known_at_every_size_with_and_without_noise(
    shape: str, height: int, width: int, noise: float
) -> None:
    for extent in (0.12, 0.24):
        reading = read_image(paint(height, width, "white", [("blue", shape, 0.4, 0.55, extent)], noise))
        assert reading.background == "white"
        assert names(reading.objects) == [("blue", shape)]
        (found,) = reading.objects
        assert found.x == pytest.approx(0.4, abs=0.02)
        assert found.y == pytest.approx(0.55, abs=0.02)
        assert found.extent == pytest.approx(extent, abs=0.02)


@pytest.mark.parametrize("background", COLOURS)
def test_every_colour_is_known_on_every_background(background: str) -> None:
    for colour in COLOURS:
        if colour != background:
            reading = read_image(paint(256, 256, background, [(colour, "circle", 0.5, 0.5, 0.15)], noise=8.0))
            assert (reading.background, names(reading.objects)) == (background, [(colour, "circle")])


def test_objects_are_told_apart_even_of_one_colour() -> None:
    objects = [("red", "star", 0.2, 0.2, 0.12), ("red", "ring", 0.7, 0.25, 0.15), ("cyan", "heart", 0.5, 0.75, 0.18)]
    reading = read_image(paint(512, 512, "black", objects))
    assert names(reading.objects) == [("cyan", "heart"), ("red", "ring"), ("red", "star")]


def test_an_empty_picture_holds_no_objects() -> None:
    reading = read_image(paint(256, 256, "pink", [], noise=20.0))
    assert (reading.background, reading.objects) == ("pink", ())


def test_soft_edges_between_black_and_white_are_not_gray_objects() -> None:
    image = Image.fromarray(paint(64, 64, "white", [("black", "square", 0.5, 0.5, 0.2)]))
    blurred = np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC))
    assert names(read_image(blurred).objects) == [("black", "square")]


def test_a_shape_outside_the_vocabulary_is_unknown() -> None:
    pixels = np.full((256, 256, 3), COLOURS["white"], dtype=np.uint8)
    pixels[120:136, 40:216] = COLOURS["green"]
    assert names(read_image(pixels).objects) == [("green", "unknown")]


def test_noise_alone_is_not_mistaken_for_a_scene() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    assert all(each.shape == "unknown" for each in read_image(pixels).objects)
