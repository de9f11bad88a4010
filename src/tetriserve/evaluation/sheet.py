"""Pictures and prompts side by side, for a person to judge."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw

from tetriserve.evaluation.trials import Trial

_COLUMNS = 6
_SIDE = 192
_MARGIN = 5
_TEXT_HEIGHT = 40
_WRONG = (213, 94, 0)


def contact_sheet(trials: Sequence[Trial]) -> Image.Image:
    """A grid of pictures over their prompts. Those with wrong objects or relations are marked."""
    width, height = _SIDE + 2 * _MARGIN, _SIDE + 2 * _MARGIN + _TEXT_HEIGHT
    num_rows = -(-len(trials) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * width, num_rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, trial in enumerate(trials):
        left, top = index % _COLUMNS * width + _MARGIN, index // _COLUMNS * height + _MARGIN
        picture = trial.image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        sheet.paste(picture, (left, top))
        line, thickness = ("lightgray", 1) if trial.is_right else (_WRONG, 4)
        draw.rectangle((left - thickness, top - thickness, left + _SIDE, top + _SIDE), outline=line, width=thickness)
        said = textwrap.fill(("" if trial.is_right else "WRONG: ") + trial.prompt.text, 36, max_lines=3)
        draw.multiline_text((left, top + _SIDE + 4), said, fill="black", font_size=10)
    return sheet
