"""Wan without torch: how its checkpoints are read, and what follows from their numbers.

Published kinds: 2.1 (one transformer), 2.2 A14B (two, each for its own noise levels), 2.2 TI2V-5B (a time for each
token, by which a first frame can be given). Those from a picture have a pipeline class of their own but for TI2V-5B,
which makes videos with a picture and without.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tetriserve.core.errors import CheckpointError
from tetriserve.core.execution import Execution
from tetriserve.core.request import Shape, Stage
from tetriserve.core.stages import image_stages
from tetriserve.models.card import ModelCard
from tetriserve.models.components import check_text_width, latent_channels
from tetriserve.models.family import Family, Guidance
from tetriserve.models.files import LayerNames, check_layers, fingerprint, get, get_count, hub_name, quoted, read_json

FROM_TEXT, FROM_IMAGE = "WanPipeline", "WanImageToVideoPipeline"
NUM_TEXT_TOKENS = 512
"""What the models were trained with, and the pipelines' default."""
FRAME_STEP = 4
"""Frames that share a latent frame: `AutoencoderKLWan` encodes so many at a time."""
_PATCH = (1, 2, 2)
"""Latents that a token stands for: frames, rows, columns. The pipelines rely on it."""
_SCHEDULERS = ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler")
_SIZES = (Shape(480, 832, 81), Shape(480, 832, 17), Shape(720, 1280, 81))
_SIZES_OF_TOKEN_TIMES = (Shape(704, 1280, 121), Shape(704, 1280, 25))
"""The first is what each was trained for; see the model cards of Wan 2.1, Wan 2.2 A14B and TI2V-5B."""
_MAX_DURATION_S = 10
_MAX_VAE_BLOCKS = 8


def read(path: Path, pipeline_class: str, index: Mapping[str, Any]) -> ModelCard:
    """See `Family.read`."""
    has_token_times = _flag(path, index, "expand_timesteps")
    has_second = _has_second(path, index)
    names = ("transformer", "transformer_2")[: 1 + has_second]
    transformers = [read_json(path / name / "config.json") for name in names]
    file = path / "transformer" / "config.json"
    num_heads = get_count({"num_attention_heads": 40, **transformers[0]}, "num_attention_heads", int, file)
    scale = _check_vae(path)
    for name, transformer in zip(names, transformers, strict=True):
        _check_transformer(path, name, transformer, transformers[0], pipeline_class, has_token_times)
    _check_image_encoder(path, index, transformers)
    _check_scheduler(path)
    width = read_json(path / "text_encoder" / "config.json").get("d_model")
    check_text_width(path, "text_dim", 4096, width, "text_encoder")
    check_layers(path, index, [LayerNames(name, "num_layers", 40, "blocks") for name in names])
    takes_image = pipeline_class == FROM_IMAGE or has_token_times
    fps = 24.0 if has_token_times else 16.0
    configs = [read_json(path / name / "config.json") for name in ("vae", "text_encoder")]
    return ModelCard(
        name=hub_name(path),
        path=path,
        family="wan",
        pipeline_class=pipeline_class,
        execution=Execution("bfloat16"),
        size_multiple=_PATCH[1] * scale,
        pixels_per_token=_PATCH[1] * scale,
        num_heads=num_heads,
        num_text_tokens=NUM_TEXT_TOKENS,
        default_num_steps=50,
        default_guidance_scale=5.0,
        has_guidance=True,
        has_negative_prompt=True,
        guides_by_passes=True,
        min_images=1 if pipeline_class == FROM_IMAGE else 0,
        max_images=1 if takes_image else 0,
        has_previews=False,
        limits=("no previews of videos on their way",),
        sizes=_SIZES_OF_TOKEN_TIMES if has_token_times else _SIZES,
        frame_step=FRAME_STEP,
        max_frames=1 + int(_MAX_DURATION_S * fps) // FRAME_STEP * FRAME_STEP,
        default_fps=fps,
        has_boundary=has_second,
        has_flow_shift=True,
        fingerprint=fingerprint({"pipeline": pipeline_class, "token_times": has_token_times}, *transformers, *configs),
    )


def stages(card: ModelCard, num_steps: int, guidance: Guidance) -> tuple[Stage, ...]:
    """See `Family.stages`. Guidance above 1 takes a second pass at each step, by an empty text where none is given."""
    return image_stages(num_steps, 2 if guidance.scale > card.passes_above else 1)


def _flag(path: Path, index: Mapping[str, Any], key: str) -> bool:
    value = index.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{path / 'model_index.json'}: {key} is {quoted(value)}; it must be true or false")
    return bool(value)


def _has_second(path: Path, index: Mapping[str, Any]) -> bool:
    """Whether a second transformer makes the steps below a noise level."""
    file, ratio = path / "model_index.json", index.get("boundary_ratio")
    has_second = index.get("transformer_2") not in (None, [None, None])
    if ratio is None:
        if has_second:
            raise CheckpointError(
                f"{file}: boundary_ratio is null, but there is a transformer_2; set the noise level below which it "
                "makes the steps, such as 0.875"
            )
        return False
    if not has_second:
        raise CheckpointError(f"{file}: boundary_ratio is {quoted(ratio)}, but transformer_2 is missing")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
        raise CheckpointError(f"{file}: boundary_ratio is {quoted(ratio)}; it must be a number from 0 to 1")
    return True


def _check_transformer(
    path: Path,
    name: str,
    transformer: Mapping[str, Any],
    first: Mapping[str, Any],
    pipeline_class: str,
    has_token_times: bool,
) -> None:
    """That it takes latents, with those of the picture where there is one, and gives latents."""
    file = path / name / "config.json"
    if tuple(patch := get({"patch_size": _PATCH, **transformer}, "patch_size", (list, tuple), file)) != _PATCH:
        raise CheckpointError(f"{file}: patch_size is {quoted(patch)}, but {pipeline_class} needs {quoted(_PATCH)}")
    num_channels = latent_channels(path, "z_dim", 16)
    num_seen = num_channels
    if pipeline_class == FROM_IMAGE and not has_token_times:
        num_seen = 2 * num_channels + FRAME_STEP  # the picture's latents, and which frames are given
    for key, expected in (("in_channels", num_seen), ("out_channels", num_channels)):
        value = transformer.get(key, 16)
        if value != expected and not (key == "out_channels" and value is None and num_seen == num_channels):
            raise CheckpointError(
                f"{file}: {key} is {quoted(value)}, but {pipeline_class} needs {expected} (z_dim of the vae is "
                f"{num_channels})"
            )
    if transformer.get("pos_embed_seq_len") is not None:
        raise CheckpointError(f"{file}: pos_embed_seq_len is set: models of a first and a last frame are not served")
    if transformer.get("image_dim") is not None and (pipeline_class != FROM_IMAGE or has_token_times):
        raise CheckpointError(
            f"{file}: image_dim is {quoted(transformer['image_dim'])}, but {pipeline_class} gives it no picture's "
            "embeddings; it must be null"
        )
    for key in ("num_attention_heads", "text_dim", "image_dim"):
        if transformer.get(key) != first.get(key):
            raise CheckpointError(
                f"{file}: {key} is {quoted(transformer.get(key))}, but that of transformer is {quoted(first.get(key))}"
            )


def _check_image_encoder(path: Path, index: Mapping[str, Any], transformers: list[dict[str, Any]]) -> None:
    """That a picture's embeddings, where they are read, are of the width that an encoder makes."""
    width = transformers[0].get("image_dim")
    if width is None:
        return
    for name in ("image_encoder", "image_processor"):
        if index.get(name) in (None, [None, None]):
            raise CheckpointError(
                f"{path / 'model_index.json'}: {name} is {quoted(index.get(name))}, but the transformer reads its "
                "embeddings; download the whole checkpoint"
            )
    file = path / "image_encoder" / "config.json"
    config = read_json(file)
    vision = config.get("vision_config")
    made = (vision if isinstance(vision, dict) else config).get("hidden_size")
    if made != width:
        raise CheckpointError(
            f"{path / 'transformer' / 'config.json'}: image_dim is {quoted(width)}, but image_encoder makes "
            f"embeddings of {quoted(made)}; they are of different checkpoints"
        )
    if not (path / "image_processor" / "preprocessor_config.json").is_file():
        raise CheckpointError(f"{path / 'image_processor'} has no preprocessor_config.json; download it again")


def _check_vae(path: Path) -> int:
    """That it says where latents lie, and what the pipelines read of it is so; returns pixels a latent's side."""
    file = path / "vae" / "config.json"
    vae = read_json(file)
    blocks = get({"dim_mult": [1, 2, 4, 4], **vae}, "dim_mult", list, file)
    if not 1 <= len(blocks) <= _MAX_VAE_BLOCKS:
        raise CheckpointError(f"{file}: dim_mult has {len(blocks)} items; allowed: 1 to {_MAX_VAE_BLOCKS}")
    halves = get({"temperal_downsample": [False, True, True], **vae}, "temperal_downsample", list, file)
    if len(halves) != len(blocks) - 1:
        raise CheckpointError(f"{file}: temperal_downsample must have one item less than dim_mult")
    scale = (1 << len(halves)) * (1 if vae.get("patch_size") is None else get_count(vae, "patch_size", int, file))
    for key, default, expected in (
        ("scale_factor_temporal", 4, 1 << sum(each is True for each in halves)),
        ("scale_factor_spatial", 8, scale),
    ):
        if (value := vae.get(key, default)) != expected:
            raise CheckpointError(f"{file}: {key} is {quoted(value)}, but its blocks make it {expected}")
    if vae.get("scale_factor_temporal", 4) != FRAME_STEP:
        raise CheckpointError(f"{file}: scale_factor_temporal is {expected}; AutoencoderKLWan works with {FRAME_STEP}")
    num_channels = latent_channels(path, "z_dim", 16)
    for key in ("latents_mean", "latents_std"):
        if key not in vae and num_channels == 16:
            continue  # the class's own
        values = get(vae, key, list, file)
        numbers = [each for each in values if isinstance(each, (int, float)) and abs(each) < 1e6]
        if len(values) != num_channels or len(numbers) != num_channels:
            raise CheckpointError(f"{file}: {key} is {quoted(values)}; it must be {num_channels} numbers")
    if 0 in vae.get("latents_std", ()):
        raise CheckpointError(f"{file}: latents_std is {quoted(vae['latents_std'])}; none may be 0")
    return scale


def _check_scheduler(path: Path) -> None:
    """That it draws no noise, moves along flows, and what it keeps between steps can be handed on."""
    file = path / "scheduler" / "scheduler_config.json"
    scheduler = read_json(file)
    name = get(scheduler, "_class_name", str, file)
    if name not in _SCHEDULERS or scheduler.get("stochastic_sampling"):
        raise CheckpointError(
            f"{file}: scheduler {name} is not served with Wan, or draws noise between steps; use {_SCHEDULERS[0]}, or "
            f"{_SCHEDULERS[1]} without stochastic_sampling"
        )
    wanted: dict[str, Any] = {"use_dynamic_shifting": False}
    if name == _SCHEDULERS[0]:
        wanted |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_p": None}
    defaults = {"prediction_type": "epsilon", "use_flow_sigmas": False}
    for key, value in wanted.items():
        if (found := scheduler.get(key, defaults.get(key, value))) != value:
            raise CheckpointError(f"{file}: {key} is {quoted(found)}; the models of Wan need {quoted(value)}")


WAN = Family(
    name="wan",
    pipeline_classes=(FROM_TEXT, FROM_IMAGE),
    adapter="tetriserve.models.wan.adapter:WanAdapter",
    components=("scheduler", "text_encoder", "tokenizer", "transformer", "vae"),
    max_text_tokens=NUM_TEXT_TOKENS,
    read=read,
    stages=stages,
    lora_components=("transformer", "transformer_2"),
)
