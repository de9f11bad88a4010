"""From a prompt and a picture to the row of a table."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from PIL import Image

from tetriserve.evaluation.drawing import draw_image, place_items
from tetriserve.evaluation.prompts import Prompt, unseen_prompts
from tetriserve.evaluation.scenes import Item, Relation, Scene
from tetriserve.evaluation.sheet import contact_sheet
from tetriserve.evaluation.trials import Share, psnr, shares, try_prompt

SCENE = Scene(
    background="white",
    items=(Item(colour="red", shape="circle"), Item(colour="blue", shape="square")),
    relations=(Relation(subject=0, name="above", target=1),),
)
PROMPT = Prompt(text="a red circle above a blue square", scene=SCENE, seed=0)


def drawn(scene: Scene) -> Image.Image:
    return Image.fromarray(draw_image(scene, place_items(scene, Random(0), 256, 256), 256, 256))


def test_prompts_are_of_scenes_held_out_and_a_longer_series_begins_with_a_shorter() -> None:
    prompts = unseen_prompts(2, 20)
    assert all(prompt.scene.is_held_out and len(prompt.scene.items) == 2 for prompt in prompts)
    assert unseen_prompts(2, 5) == prompts[:5]
    assert [prompt.seed for prompt in prompts] == list(range(20))
    assert unseen_prompts(2, 20, seed=1) != prompts


def test_shares_count_only_the_prompts_that_ask() -> None:
    lonely = Scene(background="white", items=SCENE.items[:1])
    trials = [
        try_prompt(PROMPT, drawn(SCENE)),
        try_prompt(PROMPT, drawn(lonely)),
        try_prompt(Prompt(text="a red circle", scene=lonely, seed=0), drawn(lonely)),
    ]
    assert [trial.is_right for trial in trials] == [True, False, True]
    counted = shares(trials)
    assert counted["objects"] == Share(right=2, total=3)
    assert counted["relations"] == Share(right=1, total=2)
    assert counted["background"] == Share(right=3, total=3)
    assert "sizes" not in counted
    assert counted["relations"].percent == 50


def test_psnr_is_that_of_the_mean_squared_error() -> None:
    black, gray = (Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (0, 51))
    assert psnr(black, gray) == pytest.approx(10 * np.log10(255**2 / 51**2))
    assert psnr(gray, gray) == float("inf")


def test_the_sheet_shows_every_picture_and_marks_the_wrong_ones() -> None:
    right, wrong = try_prompt(PROMPT, drawn(SCENE)), try_prompt(PROMPT, Image.new("RGB", (512, 512), "green"))
    sheet = contact_sheet([right] * 6 + [wrong])
    one_row = contact_sheet([right] * 6)
    assert (sheet.width, sheet.height) == (one_row.width, 2 * one_row.height)
    frames = [sheet.getpixel((2, 2)), sheet.getpixel((2, one_row.height + 2))]
    assert frames == [(255, 255, 255), (213, 94, 0)]
    assert sheet.getpixel((100, one_row.height + 100)) == (0, 128, 0)
