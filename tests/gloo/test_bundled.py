"""The bundled model: what is shipped, and that it draws what it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tetriserve.core.request import Shape
from tetriserve.evaluation.reading import read_image
from tetriserve.launch import find_model
from tetriserve.models.checkpoint import read_card
from tetriserve.models.flux.facts import FLUX


@pytest.fixture(scope="module")
def pipeline(bundled_dir: Path) -> Any:
    """As a user of diffusers would load it."""
    from diffusers import FluxPipeline

    torch.set_num_threads(1)
    pipeline = FluxPipeline.from_pretrained(bundled_dir)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompt: str, seed: int = 0, height: int = 256, width: int = 256) -> np.ndarray:
    image = pipeline(
        prompt, height=height, width=width, num_inference_steps=20, max_sequence_length=40,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]  # fmt: skip
    return np.asarray(image)


def test_what_is_shipped_is_small_and_is_the_model_served_when_none_is_named(bundled_dir: Path) -> None:
    weights = list(bundled_dir.rglob("*.safetensors"))
    assert len(weights) == 4
    assert sum(file.stat().st_size for file in weights) < 25e6
    assert find_model(None) == read_card(bundled_dir)


def test_the_card_of_the_bundled_model(bundled_dir: Path) -> None:
    card = read_card(bundled_dir)
    assert (card.name, card.execution.dtype, card.default_num_steps) == ("tetriserve-tiny", "float32", 20)
    assert [FLUX.num_tokens(card, Shape(side, side)) for side in (256, 512, 1024)] == [64, 256, 1024]
    assert (card.num_heads, card.num_text_tokens) == (8, 40)
    assert card.valid_degrees((1, 2, 4, 8)) == (1, 2, 4, 8)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_any_text_becomes_tokens_of_its_own(bundled_dir: Path, name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(bundled_dir / name)
    texts = ["a red circle", "a blue circle", "", "zyzzyva 12", "zyzzyva 21", "東京", "大阪", "🙂", "🙃", "Ünïcödé\x07"]
    ids = [tuple(tokenizer(text).input_ids) for text in texts]
    assert len(set(ids)) == len(texts)
    assert tokenizer("A  RED circle").input_ids == tokenizer("a red circle").input_ids
    prompt = "a red circle on a blue background"
    assert tokenizer.tokenize(prompt) == [f"{word}</w>" for word in prompt.split()]


def test_colours_background_and_relation_are_those_of_the_prompt(pipeline: Any) -> None:
    prompt = "a red circle above a blue square on a white background"
    readings = [read_image(draw(pipeline, prompt, seed)) for seed in range(4)]
    right = [
        reading.background == "white"
        and [found.colour for found in sorted(reading.objects, key=lambda found: found.y)] == ["red", "blue"]
        for reading in readings
    ]
    assert sum(right) >= 3
    places = {(round(reading.objects[0].x, 1), round(reading.objects[0].y, 1)) for reading in readings}
    assert len(places) > 1, "a seed changes where things are"


def test_a_prompt_beyond_the_vocabulary_is_a_picture_too(pipeline: Any) -> None:
    pixels = draw(pipeline, "ein Gemälde von 東京 bei Nacht, 8k, trending 🙂")
    assert pixels.shape == (256, 256, 3)
    assert pixels.dtype == np.uint8
