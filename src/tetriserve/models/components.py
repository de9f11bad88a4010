"""Checks of components that several families share, each from its configuration file alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tetriserve.core.bounds import shown
from tetriserve.core.errors import CheckpointError
from tetriserve.core.request import Shape
from tetriserve.models.files import get, get_count, quoted, read_json

SIDES = (256, 512, 1024, 2048)
"""Of the square pictures that image models are offered at."""
_MAX_VAE_BLOCKS = 8


def check_flow_matching(path: Path) -> None:
    """That the scheduler keeps no state between steps and draws no noise."""
    file = path / "scheduler/scheduler_config.json"
    scheduler = read_json(file)
    scheduler_class = get(scheduler, "_class_name", str, file)
    if scheduler_class != "FlowMatchEulerDiscreteScheduler" or scheduler.get("stochastic_sampling"):
        raise CheckpointError(
            f"{file}: scheduler {scheduler_class} keeps state or draws noise "
            "between steps; use FlowMatchEulerDiscreteScheduler without stochastic_sampling"
        )


def vae_scale(path: Path, key: str = "block_out_channels") -> int:
    """Pixels along each side of a latent: each block of the VAE but the last halves them."""
    file = path / "vae/config.json"
    num_blocks = len(get(read_json(file), key, list, file))
    if not 1 <= num_blocks <= _MAX_VAE_BLOCKS:
        raise CheckpointError(f"{file}: {key} has {num_blocks} items; allowed: 1 to {_MAX_VAE_BLOCKS}")
    return 1 << (num_blocks - 1)


def check_vae_factors(path: Path) -> None:
    file = path / "vae/config.json"
    vae = read_json(file)
    for key in ("scaling_factor", "shift_factor"):
        if not abs(get(vae, key, (int, float), file)) <= 1e6:
            raise CheckpointError(f"{file}: {key} is {shown(vae[key])}; it must be from -1e+06 to 1e+06")


def check_clip_length(path: Path, tokenizer: str = "tokenizer", encoder: str = "text_encoder") -> None:
    """That CLIP's texts are cut where its positions end: pipelines ask the tokenizer, whose default is no limit."""
    file, encoder_file = path / tokenizer / "tokenizer_config.json", path / encoder / "config.json"
    positions = get_count(
        {"max_position_embeddings": 77, **read_json(encoder_file)}, "max_position_embeddings", int, encoder_file
    )
    length = read_json(file).get("model_max_length")
    if isinstance(length, bool) or not isinstance(length, int) or not 2 < length <= positions:
        raise CheckpointError(
            f"{file}: model_max_length is {quoted(length)}; set it to {quoted(positions)}, max_position_embeddings of "
            f"the {encoder}"
        )


def check_chat_template(path: Path, tokenizer: str = "tokenizer") -> None:
    """That there is what prompts are put into before they are encoded."""
    folder = path / tokenizer
    if (folder / "chat_template.jinja").is_file():
        return
    file = folder / "tokenizer_config.json"
    if not (file.is_file() and read_json(file).get("chat_template")):
        raise CheckpointError(f"{folder} has no chat template (chat_template.jinja); download the checkpoint again")


def check_text_width(path: Path, key: str, default: int, expected: object, part: str) -> None:
    """That the transformer takes embeddings of the width, `expected`, that `part` makes."""
    file = path / "transformer/config.json"
    if (width := read_json(file).get(key, default)) != expected:
        raise CheckpointError(
            f"{file}: {key} is {quoted(width)}, but {part} makes embeddings of {quoted(expected)}; they are of "
            "different checkpoints"
        )


def check_channels(
    path: Path, transformer: Mapping[str, Any], expected: int, default: int, pipeline_class: str, hint: str
) -> None:
    """That the transformer takes, and gives, `expected` channels: those of latents and nothing else."""
    file = path / "transformer/config.json"
    in_channels = transformer.get("in_channels", default)
    for key, value in (("in_channels", in_channels), ("out_channels", transformer.get("out_channels"))):
        if value != expected and (key == "in_channels" or value is not None):
            raise CheckpointError(f"{file}: {key} is {quoted(value)}, but {pipeline_class} needs {expected} {hint}")


def latent_channels(path: Path, key: str = "latent_channels", default: int = 4) -> int:
    file = path / "vae/config.json"
    return int(get_count({key: default, **read_json(file)}, key, int, file))


def square_sizes(default_side: int, multiple: int, sides: Sequence[int] = SIDES) -> tuple[Shape, ...]:
    """The default first; those that `multiple` divides."""
    return tuple(Shape(side, side) for side in dict.fromkeys((default_side, *sides)) if side % multiple == 0)
