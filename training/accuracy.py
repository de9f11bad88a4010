"""How many pictures of scenes never trained on show what was asked for, by the independent checker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw

from tetriserve.evaluation.captions import write_caption
from tetriserve.evaluation.reading import read_image
from tetriserve.evaluation.scenes import Scene, draw_held_out
from tetriserve.evaluation.scoring import Score, score_reading
from training.tokenizers import NUM_TEXT_TOKENS

_SHEET_COLUMNS = 6


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One prompt with its picture (H, W, 3) and score."""

    scene: Scene
    prompt: str
    pixels: np.ndarray
    score: Score


def unseen_prompts(num_items: int, count: int, seed: int = 0) -> list[tuple[Scene, str]]:
    """Scenes that are never trained on, each with one caption."""
    random = Random(f"{seed} {num_items}")
    prompts = []
    for _ in range(count):
        scene = draw_held_out(random, num_items)
        prompts.append((scene, write_caption(scene, random)))
    return prompts


def try_prompts(
    pipeline: FluxPipeline, prompts: list[tuple[Scene, str]], height: int, width: int, num_steps: int, batch: int
) -> Iterator[Trial]:
    """Draw each prompt with the seed of its number, `batch` at a time."""
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        images = pipeline(
            [prompt for _, prompt in some],
            height=height,
            width=width,
            num_inference_steps=num_steps,
            max_sequence_length=NUM_TEXT_TOKENS,
            generator=[torch.Generator("cpu").manual_seed(start + index) for index in range(len(some))],
        ).images
        for (scene, prompt), image in zip(some, images, strict=True):
            pixels = np.asarray(image)
            yield Trial(scene=scene, prompt=prompt, pixels=pixels, score=score_reading(scene, read_image(pixels)))


def summarise(trials: list[Trial]) -> str:
    """Percentages of right pictures, by kind of mistake."""
    said = []
    for field in fields(Score):
        values = [value for trial in trials if (value := getattr(trial.score, field.name)) is not None]
        if values:
            said.append(f"{field.name} {100 * sum(values) / len(values):.1f} % of {len(values)}")
    return ", ".join(said)


def contact_sheet(trials: list[Trial], side: int = 192) -> Image.Image:
    """The pictures with their prompts; a red frame marks those with wrong objects or relations."""
    num_rows = -(-len(trials) // _SHEET_COLUMNS)
    sheet = Image.new("RGB", (_SHEET_COLUMNS * (side + 8), num_rows * (side + 44)), "lightgray")
    draw = ImageDraw.Draw(sheet)
    for index, trial in enumerate(trials):
        left, top = index % _SHEET_COLUMNS * (side + 8) + 4, index // _SHEET_COLUMNS * (side + 44) + 4
        if not trial.score.objects or trial.score.relations is False:
            draw.rectangle((left - 3, top - 3, left + side + 2, top + side + 2), fill="red")
        picture = Image.fromarray(trial.pixels)
        picture.thumbnail((side, side))
        sheet.paste(picture, (left, top))
        draw.multiline_text((left, top + side + 3), _wrapped(trial.prompt), fill="black", font_size=9)
    return sheet


def measure_accuracy(
    directory: Path, num_prompts: int, sides: list[int], num_steps: int, dtype: torch.dtype, sheet: Path | None
) -> None:
    """Print the accuracy on `num_prompts` unseen prompts for each number of objects and size."""
    pipeline = FluxPipeline.from_pretrained(directory, dtype=dtype)
    shown = []
    for side in sides:
        for num_items in (1, 2, 3):
            start = time.monotonic()
            prompts = unseen_prompts(num_items, num_prompts)
            trials = list(try_prompts(pipeline, prompts, side, side, num_steps, max(1, 16 * 256**2 // side**2)))
            shown += trials[:12]
            seconds = (time.monotonic() - start) / num_prompts
            print(f"{side}x{side}, {num_items} objects: {summarise(trials)} ({seconds:.2f} s each)", flush=True)
    if sheet:
        contact_sheet(shown).save(sheet)


def _wrapped(text: str, width: int = 40) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f"{word} "
    return "\n".join(lines[:3])
