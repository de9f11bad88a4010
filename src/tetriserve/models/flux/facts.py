"""FLUX without torch: how its checkpoints are read, and what follows from their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tetriserve.core.bounds import shown
from tetriserve.core.errors import CheckpointError
from tetriserve.core.execution import Execution
from tetriserve.core.request import Shape, Stage
from tetriserve.core.stages import image_stages
from tetriserve.models.card import ModelCard
from tetriserve.models.family import Family, Guidance
from tetriserve.models.files import (
    LayerNames,
    check_layers,
    fingerprint,
    get,
    get_count,
    hub_name,
    quoted,
    read_json,
)

_MAX_TEXT_TOKENS = 512
"""What `FluxPipeline` allows, and its default."""
_SIDES = (256, 512, 1024, 2048)
_DEFAULT_SAMPLE_SIZE = 128
"""Side in latents of the picture that `FluxPipeline` draws where no size is asked for."""
_MAX_VAE_BLOCKS = 8
_LAYERS = (
    LayerNames("transformer", "num_layers", 19, "transformer_blocks"),
    LayerNames("transformer", "num_single_layers", 38, "single_transformer_blocks"),
    LayerNames("text_encoder", "num_hidden_layers", 12, "encoder.layers"),
    LayerNames("text_encoder_2", "num_layers", 6, "encoder.block"),
)


def read(path: Path, pipeline_class: str, index: Mapping[str, Any]) -> ModelCard:
    """See `Family.read`."""
    transformer, vae, text_encoder, text_encoder_2 = (
        read_json(path / part / "config.json") for part in ("transformer", "vae", "text_encoder", "text_encoder_2")
    )
    has_guidance = bool(transformer.get("guidance_embeds", False))
    num_vae_blocks = len(get(vae, "block_out_channels", list, path / "vae/config.json"))
    if not 1 <= num_vae_blocks <= _MAX_VAE_BLOCKS:
        raise CheckpointError(
            f"{path / 'vae/config.json'}: block_out_channels has {num_vae_blocks} items; "
            f"allowed: 1 to {_MAX_VAE_BLOCKS}"
        )
    num_heads = get_count(transformer, "num_attention_heads", int, path / "transformer/config.json")
    _check_scheduler(path / "scheduler/scheduler_config.json")
    _check_vae(path / "vae/config.json", vae)
    _check_channels(path / "transformer/config.json", transformer, vae)
    _check_text_width(path / "transformer/config.json", transformer, text_encoder, text_encoder_2)
    _check_text_length(path / "tokenizer/tokenizer_config.json", text_encoder)
    check_layers(path, index, _LAYERS)
    vae_scale = 2 ** (num_vae_blocks - 1)
    sides = dict.fromkeys((_DEFAULT_SAMPLE_SIZE * vae_scale, *_SIDES))
    return ModelCard(
        name=hub_name(path),
        path=path,
        family="flux",
        pipeline_class=pipeline_class,
        execution=Execution("bfloat16"),
        size_multiple=2 * vae_scale,
        pixels_per_token=2 * vae_scale,
        num_heads=num_heads,
        num_text_tokens=_MAX_TEXT_TOKENS,
        default_num_steps=28 if has_guidance else 4,
        default_guidance_scale=3.5,
        has_guidance=has_guidance,
        has_negative_prompt=True,
        sizes=tuple(Shape(side, side) for side in sides if side % (2 * vae_scale) == 0),
        fingerprint=fingerprint(transformer, vae, text_encoder, text_encoder_2),
    )


def num_tokens(card: ModelCard, shape: Shape) -> int:
    """See `Family.num_tokens`."""
    return (shape.height // card.pixels_per_token) * (shape.width // card.pixels_per_token) * shape.frames


def stages(card: ModelCard, num_steps: int, guidance: Guidance) -> tuple[Stage, ...]:
    """See `Family.stages`. Guidance by a negative prompt takes a second pass at each step; the scale is an input."""
    has_second_pass = guidance.negative_prompt is not None and guidance.true_cfg_scale > 1
    return image_stages(num_steps, 2 if has_second_pass else 1)


def _check_scheduler(file: Path) -> None:
    scheduler = read_json(file)
    scheduler_class = get(scheduler, "_class_name", str, file)
    if scheduler_class != "FlowMatchEulerDiscreteScheduler" or scheduler.get("stochastic_sampling"):
        raise CheckpointError(
            f"{file}: scheduler {scheduler_class} keeps state or draws noise "
            "between steps; use FlowMatchEulerDiscreteScheduler without stochastic_sampling"
        )


def _check_vae(file: Path, vae: Mapping[str, Any]) -> None:
    for key in ("scaling_factor", "shift_factor"):
        if not abs(get(vae, key, (int, float), file)) <= 1e6:
            raise CheckpointError(f"{file}: {key} is {shown(vae[key])}; it must be from -1e+06 to 1e+06")


def _check_channels(file: Path, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """That the transformer takes latents and nothing else: FLUX Fill, Canny and Depth take a picture beside them."""
    expected = 4 * get_count(
        {"latent_channels": 4, **vae}, "latent_channels", int, file.parent.parent / "vae/config.json"
    )
    in_channels = transformer.get("in_channels", 64)
    for key, value in (("in_channels", in_channels), ("out_channels", transformer.get("out_channels"))):
        if value != expected and (key == "in_channels" or value is not None):
            raise CheckpointError(
                f"{file}: {key} is {quoted(value)}, but FluxPipeline needs {expected} (4 times latent_channels of the "
                "vae); FLUX Fill, Canny and Depth need pipelines that are not served"
            )


def _check_text_width(
    file: Path, transformer: Mapping[str, Any], text_encoder: Mapping[str, Any], text_encoder_2: Mapping[str, Any]
) -> None:
    for key, default, width, part in (
        ("pooled_projection_dim", 768, text_encoder.get("hidden_size", 512), "text_encoder"),
        ("joint_attention_dim", 4096, text_encoder_2.get("d_model", 512), "text_encoder_2"),
    ):
        if (expected := transformer.get(key, default)) != width:
            raise CheckpointError(
                f"{file}: {key} is {quoted(expected)}, but {part} makes embeddings of {quoted(width)}; they are of "
                "different checkpoints"
            )


def _check_text_length(file: Path, text_encoder: Mapping[str, Any]) -> None:
    """That CLIP's texts are cut where its positions end: the pipeline asks the tokenizer, whose default is no limit."""
    encoder_file = file.parent.parent / "text_encoder/config.json"
    positions = get_count({"max_position_embeddings": 77, **text_encoder}, "max_position_embeddings", int, encoder_file)
    length = read_json(file).get("model_max_length")
    if isinstance(length, bool) or not isinstance(length, int) or not 2 < length <= positions:
        raise CheckpointError(
            f"{file}: model_max_length is {quoted(length)}; set it to {quoted(positions)}, max_position_embeddings of "
            "the text_encoder"
        )


FLUX = Family(
    name="flux",
    pipeline_classes=("FluxPipeline",),
    adapter="tetriserve.models.flux.adapter:FluxAdapter",
    components=("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae"),
    max_text_tokens=_MAX_TEXT_TOKENS,
    read=read,
    num_tokens=num_tokens,
    stages=stages,
)
