"""Pictures as clients send them."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def pixels_of(height=48, width=80, seed=0):
    """Blocks of random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.ascontiguousarray(colours.repeat(8, 0).repeat(8, 1)[:height, :width])


def file_of(image, kind="png", **options):
    """Of a Pillow image, or of pixels."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def data_url(file, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


PIXELS = pixels_of()
PNG = file_of(PIXELS)
