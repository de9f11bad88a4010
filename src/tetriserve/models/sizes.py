"""What the weights of a checkpoint take in memory, read off the headers of its files: nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tetriserve.core.errors import CheckpointError
from tetriserve.core.execution import DEFAULT
from tetriserve.models.card import ModelCard
from tetriserve.models.files import find_weights, read_header, read_json

TEXT_ENCODER = "text_encoder"
"""How the names of components begin that ranks without text encoders leave out."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def weight_bytes(card: ModelCard) -> dict[str, int]:
    """Bytes of each component's tensors in the dtype that the model is served in."""
    sizes = {}
    for component, entry in read_json(card.path / "model_index.json").items():
        if not isinstance(entry, list) or entry == [None, None]:
            continue
        try:
            files = find_weights(card.path / component, entry[0]).files
        except CheckpointError:
            continue  # a tokenizer or a scheduler; models have been checked when the card was read
        is_small = component == "transformer" and card.execution.quantization != DEFAULT
        sizes[component] = sum(
            _num_items(tensor) * (1 if is_small else _BYTES[card.execution.dtype])
            for file in files
            for tensor in read_header(file).values()
        )
    return sizes


def _num_items(tensor: Mapping[str, Any]) -> int:
    shape = tensor.get("shape")
    is_sound = isinstance(shape, list) and all(isinstance(side, int) for side in shape)
    return math.prod(shape) if is_sound and shape else 0
