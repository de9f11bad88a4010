"""Any pipeline of diffusers that makes a picture or a video of a text, without torch: what its call and its
configurations say of it.

A pipeline is served as its own call makes them, with all that this call chooses where a request says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tetriserve.core.errors import CheckpointError
from tetriserve.core.execution import Execution
from tetriserve.core.request import Shape, Stage
from tetriserve.core.stages import image_stages
from tetriserve.models.card import ModelCard
from tetriserve.models.family import Family, Guidance
from tetriserve.models.files import fingerprint, hub_name, read_json
from tetriserve.models.generic.signature import REQUIRED, call_of, configuration_of
from tetriserve.models.generic.videos import frames_of, video_facts

LIMITS = (
    "one rank for each request (degree 1)",
    "no batches: each step is made for one request",
    "no previews of pictures on their way",
    "no count of text tokens, and no word of a prompt that was cut",
    "a request that goes on at another rank begins the pipeline's call again, with the steps that are done left out",
)
"""As `/v1/models` tells them."""
VIDEO_LIMITS = (
    "one rank for each request (degree 1)",
    "no batches: each step is made for one request",
    "no previews of videos on their way",
    *LIMITS[3:],
    "all frames of a video are decoded at once",
    "no guidance_scale_2, boundary_ratio and flow_shift: the checkpoint's own are used",
)
SOUND_LIMIT = "no sound: what the pipeline makes of it is left out"
_NEEDED = ("prompt", "height", "width", "num_inference_steps", "generator", "output_type", "return_dict")
_OTHER_TASKS = ("audio_length_in_s", "strength", "mask_image", "control_image")
"""Of calls that make neither a picture nor a video from a text alone."""
_SOUND = "audio_latents"
"""Of calls that make sound, too."""
_MAX_TEXT_TOKENS = 4096
_DEFAULT_SIDE = 1024
_DEFAULT_NUM_STEPS = 28
_LEAST_MULTIPLE = 16
_MAX_SIDE = 4096
_MAX_BLOCKS = 8


def read(path: Path, pipeline_class: str, index: Mapping[str, Any]) -> ModelCard:
    """See `Family.read`.

    Heights and widths are multiples of two latents, and of 16 pixels: more than most pipelines ask for. The only size
    is the default one; `tetriserve.json` may list others.
    """
    parameters = _checked_call(path / "model_index.json", pipeline_class)
    components = [name for name, entry in index.items() if isinstance(entry, list) and entry != [None, None]]
    files = {name: path / name / "config.json" for name in components}
    configs = {name: read_json(file) for name, file in files.items() if file.is_file()}
    denoiser = next((config for name, config in configs.items() if name.startswith(("transformer", "unet"))), None)
    if denoiser is None:
        raise CheckpointError(f"{path / 'model_index.json'} names neither transformer nor unet, which make the steps")
    scale = _vae_scale(configs.get("vae", {}))
    multiple = max(2 * scale, _LEAST_MULTIPLE)
    side = _default_side(parameters, denoiser, scale) // multiple * multiple
    true_cfg = "true_cfg_scale" in parameters
    guider = read_json(path / "guider" / "guider_config.json") if "guider" in components else {}
    guidance = parameters.get("guidance_scale", guider.get("guidance_scale"))
    has_guidance = "guidance_scale" in parameters or "guidance_scale" in guider
    has_negative_prompt = "negative_prompt" in parameters
    card = ModelCard(
        name=hub_name(path),
        path=path,
        family="generic",
        pipeline_class=pipeline_class,
        execution=Execution("bfloat16"),
        size_multiple=multiple,
        pixels_per_token=multiple,
        num_heads=1,
        num_text_tokens=_num_text_tokens(parameters, denoiser),
        default_num_steps=_number(parameters.get("num_inference_steps"), _DEFAULT_NUM_STEPS),
        default_guidance_scale=float(_number(guidance, 1)),
        has_guidance=has_guidance,
        has_negative_prompt=has_negative_prompt and (has_guidance or true_cfg),
        guides_by_passes=has_guidance and has_negative_prompt and not true_cfg,
        can_batch=False,
        has_previews=False,
        limits=LIMITS,
        sizes=(Shape(side, side),),
        fingerprint=fingerprint(
            {"adapter": "generic", "pipeline": pipeline_class}, *filter(None, (guider,)), *configs.values()
        ),
    )
    if frames_of(parameters) is None:
        return card
    vae = configs.get("vae", {})
    defaults = configuration_of(str(vae.get("_class_name", "")))
    facts = video_facts(pipeline_class, parameters, denoiser, {**defaults, **vae})
    return replace(
        card,
        size_multiple=facts.size_multiple,
        pixels_per_token=facts.size_multiple,
        sizes=(facts.shape,),
        frame_step=facts.frame_step,
        max_frames=facts.max_frames,
        default_fps=facts.default_fps,
        limits=(*VIDEO_LIMITS, SOUND_LIMIT) if _SOUND in parameters else VIDEO_LIMITS,
    )


def stages(card: ModelCard, num_steps: int, guidance: Guidance) -> tuple[Stage, ...]:
    """See `Family.stages`. A pipeline with a negative prompt is taken to guide by it, an empty one if none is given."""
    scale = guidance.scale if card.guides_by_passes else guidance.true_cfg_scale
    has_second_pass = scale > 1 and (card.guides_by_passes or guidance.negative_prompt is not None)
    return image_stages(num_steps, 2 if has_second_pass else 1)


def _checked_call(file: Path, pipeline_class: str) -> Mapping[str, object]:
    """The call's parameters, if it makes a picture or a video of a text alone."""
    try:
        parameters = call_of(pipeline_class)
    except LookupError as error:
        raise CheckpointError(f"{file}: {error.args[0]}; code that models bring is never run") from None
    problem = next((f"does not take {name!r}" for name in _NEEDED if name not in parameters), None)
    problem = problem or next((f"takes {name!r}" for name in _OTHER_TASKS if name in parameters), None)
    others = (name for name, default in parameters.items() if default is REQUIRED and name != "prompt")
    problem = problem or next((f"needs {name!r}" for name in others), None)
    if problem:
        raise CheckpointError(
            f"{file}: the call of {pipeline_class} {problem}; --adapter generic serves pipelines that make a picture "
            "or a video of a text alone"
        )
    return parameters


def _default_side(parameters: Mapping[str, object], denoiser: Mapping[str, Any], scale: int) -> int:
    """As pipelines choose it: a number in their call, else the side that the denoiser was trained for."""
    if type(side := parameters["height"]) is not int:
        sample_size = denoiser.get("sample_size")
        side = sample_size * scale if type(sample_size) is int else _DEFAULT_SIDE
    return min(max(side, 2 * scale, _LEAST_MULTIPLE), _MAX_SIDE)


def _vae_scale(vae: Mapping[str, Any]) -> int:
    """Pixels along each side of a latent; 8 where the configuration does not say."""
    for key in ("block_out_channels", "encoder_block_out_channels", "dim_mult"):
        if isinstance(blocks := vae.get(key), list) and 1 <= len(blocks) <= _MAX_BLOCKS:
            return 1 << (len(blocks) - 1)
    return 8


def _num_text_tokens(parameters: Mapping[str, object], denoiser: Mapping[str, Any]) -> int:
    """As in `ModelCard`. A denoiser that has places for so many, such as CogVideoX's, leaves requests no choice."""
    length = parameters.get("max_sequence_length")
    if type(length) is not int or length < 1 or "max_text_seq_length" in denoiser:
        return 0
    return min(length, _MAX_TEXT_TOKENS)


def _number(value: object, otherwise: float) -> Any:
    return value if type(value) in (int, float) else otherwise


GENERIC = Family(
    name="generic",
    pipeline_classes=(),
    takes_any_class=True,
    adapter="tetriserve.models.generic.adapter:GenericAdapter",
    components=("scheduler",),
    max_text_tokens=_MAX_TEXT_TOKENS,
    read=read,
    stages=stages,
)
