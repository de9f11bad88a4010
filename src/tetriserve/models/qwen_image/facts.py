"""Qwen-Image without torch: how its checkpoints are read, and what follows from their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tetriserve.core.errors import CheckpointError
from tetriserve.core.execution import Execution
from tetriserve.core.request import Stage
from tetriserve.core.stages import image_stages
from tetriserve.models.card import ModelCard
from tetriserve.models.components import (
    check_flow_matching,
    check_text_width,
    latent_channels,
    square_sizes,
    vae_scale,
)
from tetriserve.models.family import Family, Guidance
from tetriserve.models.files import LayerNames, check_layers, fingerprint, get, get_count, hub_name, quoted, read_json

MAX_TEXT_TOKENS = 1024
"""What `QwenImagePipeline` allows."""
_NUM_TEXT_TOKENS = 512
_DEFAULT_SAMPLE_SIZE = 128
"""Side in latents of the picture that `QwenImagePipeline` draws where no size is asked for."""
_LAYERS = (LayerNames("transformer", "num_layers", 60, "transformer_blocks"),)
"""Of the text encoder, tensors are named in two ways: loading compares them."""
_OTHER_PIPELINES = ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope")
"""Switches of the transformer that no served pipeline can drive."""


def read(path: Path, pipeline_class: str, index: Mapping[str, Any]) -> ModelCard:
    """See `Family.read`."""
    transformer, vae, text_encoder = (
        read_json(path / part / "config.json") for part in ("transformer", "vae", "text_encoder")
    )
    file = path / "transformer/config.json"
    num_heads = get_count({"num_attention_heads": 24, **transformer}, "num_attention_heads", int, file)
    scale = vae_scale(path, "dim_mult")
    text = text_encoder.get("text_config")
    width = (text if isinstance(text, dict) else text_encoder).get("hidden_size")
    check_flow_matching(path)
    _check_transformer(path, transformer, pipeline_class)
    _check_vae(path, vae)
    check_text_width(path, "joint_attention_dim", 3584, width, "text_encoder")
    check_layers(path, index, _LAYERS)
    return ModelCard(
        name=hub_name(path),
        path=path,
        family="qwen_image",
        pipeline_class=pipeline_class,
        execution=Execution("bfloat16"),
        size_multiple=2 * scale,
        pixels_per_token=2 * scale,
        num_heads=num_heads,
        num_text_tokens=_NUM_TEXT_TOKENS,
        default_num_steps=50,
        # A schedule that is stretched to a last noise level above 0 is undefined for one step.
        min_num_steps=2 if read_json(path / "scheduler/scheduler_config.json").get("shift_terminal") else 1,
        default_guidance_scale=1.0,
        has_guidance=False,
        has_negative_prompt=True,
        max_images=1,
        default_strength=0.6,
        sizes=square_sizes(_DEFAULT_SAMPLE_SIZE * scale, 2 * scale),
        fingerprint=fingerprint(transformer, vae, text_encoder),
    )


def stages(card: ModelCard, num_steps: int, guidance: Guidance) -> tuple[Stage, ...]:
    """See `Family.stages`. Guidance by a negative prompt takes a second pass at each step."""
    has_second_pass = guidance.negative_prompt is not None and guidance.true_cfg_scale > 1
    return image_stages(num_steps, 2 if has_second_pass else 1)


def _check_transformer(path: Path, transformer: Mapping[str, Any], pipeline_class: str) -> None:
    """That it takes, and gives, the tokens of latents and nothing else."""
    file = path / "transformer/config.json"
    for switch in _OTHER_PIPELINES:
        if transformer.get(switch):
            raise CheckpointError(f"{file}: {switch} is {quoted(transformer[switch])}; {pipeline_class} needs false")
    num_channels = latent_channels(path, "z_dim", 16)
    for key, default, expected in (("in_channels", 64, 4 * num_channels), ("out_channels", 16, num_channels)):
        if (value := transformer.get(key, default)) != expected:
            raise CheckpointError(
                f"{file}: {key} is {quoted(value)}, but {pipeline_class} needs {expected} "
                f"(z_dim of the vae is {num_channels})"
            )
    if (patch := transformer.get("patch_size", 2)) != 2:
        raise CheckpointError(f"{file}: patch_size is {quoted(patch)}, but {pipeline_class} needs 2")


def _check_vae(path: Path, vae: Mapping[str, Any]) -> None:
    """That it is of the scale that the pipeline reads elsewhere, and says where latents lie."""
    file = path / "vae/config.json"
    if len(get(vae, "temperal_downsample", list, file)) != len(vae["dim_mult"]) - 1:
        raise CheckpointError(f"{file}: temperal_downsample must have one item less than dim_mult")
    num_channels = latent_channels(path, "z_dim", 16)
    for key in ("latents_mean", "latents_std"):
        values = get(vae, key, list, file)
        if len(values) != num_channels or not all(
            isinstance(each, (int, float)) and abs(each) < 1e6 for each in values
        ):
            raise CheckpointError(f"{file}: {key} is {quoted(values)}; it must be {num_channels} numbers")
    if 0 in vae["latents_std"]:
        raise CheckpointError(f"{file}: latents_std is {quoted(vae['latents_std'])}; none may be 0")


QWEN_IMAGE = Family(
    name="qwen_image",
    pipeline_classes=("QwenImagePipeline",),
    adapter="tetriserve.models.qwen_image.adapter:QwenImageAdapter",
    components=("scheduler", "text_encoder", "tokenizer", "transformer", "vae"),
    max_text_tokens=MAX_TEXT_TOKENS,
    read=read,
    stages=stages,
    lora_components=("transformer",),
)
