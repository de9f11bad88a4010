"""Qwen2-VL's processor of texts and pictures, without the part for videos: that part alone needs torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor


class PictureProcessor(Qwen2VLProcessor):  # type: ignore[misc]
    """Takes and gives what `Qwen2VLProcessor` does, for texts and pictures."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        """transformers reads off these parameters which parts there are."""
        super().__init__(image_processor, tokenizer, None, chat_template)


def load_processor(folder: Path) -> PictureProcessor:
    """Of the component's folder; pictures are prepared by PIL and numpy."""
    images = Qwen2VLImageProcessorPil.from_pretrained(str(folder), local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return PictureProcessor(images, tokenizer)
