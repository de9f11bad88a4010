"""Pipelines that make videos of a text: what their calls and configurations say of frames, rates and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt, prod
from typing import Any

from tetriserve.core.request import Shape

FRAMES = ("num_frames", "frames", "video_length")
"""What calls name the number of frames."""
RATES = ("frame_rate", "fps")
"""What calls name the frames per second, where the model is told them."""
_FPS = {
    "AllegroPipeline": 15.0,
    "CogVideoXPipeline": 8.0,
    "EasyAnimatePipeline": 8.0,
    "HunyuanVideo15Pipeline": 24.0,
    "HunyuanVideoPipeline": 24.0,
    "Kandinsky5T2VPipeline": 24.0,
    "LattePipeline": 8.0,
    "MochiPipeline": 30.0,
    "MotifVideoPipeline": 24.0,
    "SkyReelsV2Pipeline": 24.0,
}
"""Of classes whose calls do not name them: as the models' authors publish them."""
_OTHER_FPS = 16.0
_DEFAULT_SHAPE = Shape(480, 848, 121)
"""Where neither the call nor the denoiser says anything."""
_LEAST_MULTIPLE = 16
_MAX_RATIO = 64
_MAX_SIDE = 4096
_MAX_FRAMES = 1025
_MAX_DURATION_S = 10
"""Of videos whose length no denoiser is bound to; longer ones have not been seen to be any good."""
_MAX_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class FrameFacts:
    """
    shape: the default.
    frame_step, max_frames: as in `ModelCard`.
    size_multiple: pixels of a latent, and of the patch of latents that is a token; at least 16.
    """

    shape: Shape
    frame_step: int
    max_frames: int
    size_multiple: int
    default_fps: float


def frames_of(parameters: Mapping[str, object]) -> str | None:
    """What a call with these parameters names the number of frames; None if it makes no video."""
    return next((name for name in FRAMES if name in parameters), None)


def video_facts(
    pipeline_class: str, parameters: Mapping[str, object], denoiser: Mapping[str, Any], vae: Mapping[str, Any]
) -> FrameFacts:
    """Of a pipeline whose call has `parameters`; `denoiser` and `vae` are whole configurations, defaults included."""
    frame_step, scale = _frame_step(denoiser, vae), min(_ratio_of_sides(vae), _MAX_RATIO)
    multiple = max(scale * _patch_of(denoiser), _LEAST_MULTIPLE)
    height, width = (_side(name, parameters, denoiser, scale) // multiple * multiple for name in ("height", "width"))
    frames = _num_frames(parameters, denoiser, frame_step)
    rate = next((value for name in RATES if type(value := parameters.get(name)) in (int, float)), None)
    fps = float(rate) if isinstance(rate, int | float) and rate > 0 else _FPS.get(pipeline_class, _OTHER_FPS)
    most = 1 + int(_MAX_DURATION_S * fps) // frame_step * frame_step
    has_places = frame_step == 1 or "video_length" in denoiser  # as many as it was trained with, one for each frame
    return FrameFacts(
        shape=Shape(max(height, multiple), max(width, multiple), frames),
        frame_step=frame_step,
        max_frames=frames if has_places else max(frames, most),
        size_multiple=multiple,
        default_fps=fps,
    )


def _num_frames(parameters: Mapping[str, object], denoiser: Mapping[str, Any], frame_step: int) -> int:
    """Of the default, as pipelines choose it: a number in their call, else as many as the denoiser was trained with."""
    frames = parameters[frames_of(parameters) or ""]
    if type(frames) is not int:
        frames = denoiser.get("sample_frames")
        if type(frames) is not int:
            frames = _DEFAULT_SHAPE.frames
        elif frames % frame_step != 1 % frame_step:  # Allegro counts latent frames, CogVideoX frames
            frames *= frame_step
    assert isinstance(frames, int)
    return 1 + (min(max(frames, 1 + frame_step), _MAX_FRAMES) - 1) // frame_step * frame_step


def _frame_step(denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """Latte's denoiser knows one length of videos, that in its configuration."""
    if type(length := denoiser.get("video_length")) is int and 1 < length <= _MAX_FRAMES:
        return length - 1
    return min(_ratio_of_frames(vae), _MAX_RATIO)


def _ratio_of_frames(vae: Mapping[str, Any]) -> int:
    """Frames by which videos differ in length: those that share a latent frame. The VAE of a picture has one for each.

    CogVideoX's decodes latent frames in pairs, after the first: of another number it makes three frames too many.
    """
    for key in ("temporal_compression_ratio", "scale_factor_temporal"):
        if ratio := _as_ratio(vae.get(key)):
            return 2 * ratio if vae.get("_class_name") == "AutoencoderKLCogVideoX" else ratio
    if (halvings := _halvings(vae)) is not None:
        return (_as_ratio(vae.get("patch_size_t")) or 1) << halvings
    if (expansions := _ratios(vae.get("temporal_expansions"))) is not None:
        return prod(expansions)
    if vae.get("_class_name") == "AutoencoderKLMagvit":  # it halves frames at all blocks but two
        return 1 << max(_num_blocks(vae) - 2, 0)
    return 1


def _ratio_of_sides(vae: Mapping[str, Any]) -> int:
    """Pixels along each side of a latent."""
    for key in ("spatial_compression_ratio", "scale_factor_spatial"):
        if ratio := _as_ratio(vae.get(key)):
            return ratio
    if (halvings := _halvings(vae)) is not None:
        return (_as_ratio(vae.get("patch_size")) or 1) << halvings
    if (expansions := _ratios(vae.get("spatial_expansions"))) is not None:
        return prod(expansions)
    return 1 << max(_num_blocks(vae) - 1, 0)


def _halvings(vae: Mapping[str, Any]) -> int | None:
    """Of frames and of sides, by LTX's VAEs."""
    scaling = vae.get("spatio_temporal_scaling")
    return sum(map(bool, scaling[:_MAX_BLOCKS])) if isinstance(scaling, list | tuple) else None


def _num_blocks(vae: Mapping[str, Any]) -> int:
    blocks = vae.get("block_out_channels")
    return len(blocks) if isinstance(blocks, list | tuple) and 1 <= len(blocks) <= _MAX_BLOCKS else 4


def _patch_of(denoiser: Mapping[str, Any]) -> int:
    """Latents along each side of a token; 2 where the configuration does not say."""
    patch = denoiser.get("patch_size")
    return _as_ratio(patch[-1] if isinstance(patch, list | tuple) and patch else patch) or 2


def _side(name: str, parameters: Mapping[str, object], denoiser: Mapping[str, Any], scale: int) -> int:
    """As pipelines choose it: a number in their call, else the latents that the denoiser was trained for, else those of
    a picture of 16:9 with the area that it was trained for."""
    side = parameters[name]
    if type(side) is not int:
        latents = denoiser.get(f"sample_{name}", denoiser.get("sample_size"))
        area = denoiser.get("target_size")
        if type(latents) is int:
            side = latents * scale
        elif type(area) is int and 0 < area <= _MAX_SIDE:
            side = isqrt(area * area * 9 // 16) if name == "height" else isqrt(area * area * 16 // 9)
        else:
            side = getattr(_DEFAULT_SHAPE, name)
    assert isinstance(side, int)
    return min(max(side, 0), _MAX_SIDE)


def _ratios(value: object) -> list[int] | None:
    if not isinstance(value, list | tuple) or len(value) > _MAX_BLOCKS:
        return None
    return [_as_ratio(each) or 1 for each in value]


def _as_ratio(value: object) -> int | None:
    """A whole number of 1 to `_MAX_RATIO`; configurations have some as floats."""
    is_number = type(value) in (int, float)
    return int(value) if is_number and 1 <= value <= _MAX_RATIO and value == int(value) else None  # type: ignore[operator, call-overload]
