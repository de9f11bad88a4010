"""What `--adapter generic` reads of pipelines that make videos, without torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from tetriserve.models.files import module_of
from tetriserve.models.generic.signature import call_of, configuration_of
from tetriserve.models.generic.videos import FrameFacts, frames_of, video_facts

_LTX2 = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
_WAN_5B = {"scale_factor_temporal": 4, "scale_factor_spatial": 16, "patch_size": 2}
_ALLEGRO = {"sample_frames": 22, "sample_height": 90, "sample_width": 160}
_LATTE = {"video_length": 16, "sample_size": 64, "patch_size": 2}


def facts_of(
    pipeline_class: str,
    denoiser_class: str,
    vae_class: str,
    denoiser: Mapping[str, Any] | None = None,
    vae: Mapping[str, Any] | None = None,
) -> FrameFacts:
    """Of a checkpoint with the classes' own configurations, but for what is given."""
    return video_facts(
        pipeline_class,
        call_of(pipeline_class),
        {**configuration_of(denoiser_class), **(denoiser or {})},
        {**configuration_of(vae_class), "_class_name": vae_class, **(vae or {})},
    )


@pytest.mark.parametrize(
    ("classes", "changes", "expected"),
    [
        (("AllegroPipeline", "AllegroTransformer3DModel", "AutoencoderKLAllegro"), (_ALLEGRO,),
         ("1280x720x85", 4, 149, 16, 15.0)),
        (("AnimateDiffPipeline", "UNetMotionModel", "AutoencoderKL"),
         ({"sample_size": 64}, {"block_out_channels": [128, 256, 512, 512]}), ("512x512x16", 1, 16, 16, 16.0)),
        (("CogVideoXPipeline", "CogVideoXTransformer3DModel", "AutoencoderKLCogVideoX"), (),
         ("720x480x49", 8, 81, 16, 8.0)),
        (("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", "AutoencoderKLHunyuanVideo"), (),
         ("1280x720x129", 4, 241, 16, 24.0)),
        (("HunyuanVideo15Pipeline", "HunyuanVideo15Transformer3DModel", "AutoencoderKLHunyuanVideo15"), (),
         ("848x480x121", 4, 241, 16, 24.0)),
        (("Kandinsky5T2VPipeline", "Kandinsky5Transformer3DModel", "AutoencoderKLHunyuanVideo"), (),
         ("768x512x121", 4, 241, 16, 24.0)),
        (("LattePipeline", "LatteTransformer3DModel", "AutoencoderKL"), (_LATTE,), ("512x512x16", 15, 16, 16, 8.0)),
        (("LTXPipeline", "LTXVideoTransformer3DModel", "AutoencoderKLLTXVideo"), (),
         ("704x512x161", 8, 249, 32, 25.0)),
        (("LTX2Pipeline", "LTX2VideoTransformer3DModel", "AutoencoderKLLTX2Video"), ({}, _LTX2),
         ("768x512x121", 8, 241, 32, 24.0)),
        (("MochiPipeline", "MochiTransformer3DModel", "AutoencoderKLMochi"), (), ("848x480x19", 6, 301, 16, 30.0)),
        (("SanaVideoPipeline", "SanaVideoTransformer3DModel", "AutoencoderKLWan"), (),
         ("832x480x81", 4, 161, 16, 16.0)),
        (("SkyReelsV2Pipeline", "SkyReelsV2Transformer3DModel", "AutoencoderKLWan"), (),
         ("960x544x97", 4, 241, 16, 24.0)),
        (("WanPipeline", "WanTransformer3DModel", "AutoencoderKLWan"), (), ("832x480x81", 4, 161, 16, 16.0)),
        (("WanPipeline", "WanTransformer3DModel", "AutoencoderKLWan"), ({}, _WAN_5B),
         ("832x480x81", 4, 161, 32, 16.0)),
        (("EasyAnimatePipeline", "EasyAnimateTransformer3DModel", "AutoencoderKLMagvit"), (),
         ("512x512x49", 4, 81, 16, 8.0)),
    ],
    ids=lambda value: value[0].removesuffix("Pipeline") if isinstance(value, tuple) and len(value) == 3 else "",
)  # fmt: skip
def test_sizes_frames_and_rates_are_the_published_models(
    classes: tuple[str, str, str], changes: tuple[Mapping[str, Any], ...], expected: tuple[object, ...]
) -> None:
    facts = facts_of(*classes, *changes)
    found = (str(facts.shape), facts.frame_step, facts.max_frames, facts.size_multiple, facts.default_fps)
    assert found == expected


@pytest.mark.parametrize("value", [0, -4, 1e300, float("nan"), True, "4", None, [4], 2**70])
def test_configurations_of_no_sense_give_facts_within_bounds(value: object) -> None:
    keys = (
        "temporal_compression_ratio", "spatial_compression_ratio", "patch_size_t", "patch_size", "temporal_expansions",
        "spatio_temporal_scaling", "block_out_channels", "scale_factor_temporal",
    )  # fmt: skip
    denoiser = dict.fromkeys(("sample_frames", "sample_height", "sample_width", "patch_size", "video_length"), value)
    facts = video_facts("CogVideoXPipeline", call_of("CogVideoXPipeline"), denoiser, dict.fromkeys(keys, value))
    shape = facts.shape
    assert 16 <= shape.height <= 8192 and 16 <= shape.width <= 8192 and 2 <= shape.frames <= 1025
    assert 1 <= facts.frame_step <= 1024 and (shape.frames - 1) % facts.frame_step == 0
    assert shape.frames <= facts.max_frames and (facts.max_frames - 1) % facts.frame_step == 0
    assert shape.height % facts.size_multiple == 0 == shape.width % facts.size_multiple


def test_calls_that_name_frames_make_videos() -> None:
    names = {
        "HunyuanVideoPipeline": "num_frames", "SanaVideoPipeline": "frames", "LattePipeline": "video_length",
        "SanaPipeline": None, "FluxPipeline": None, "StableDiffusionPipeline": None,
    }  # fmt: skip
    assert {name: frames_of(call_of(name)) for name in names} == names


def test_components_are_of_diffusers_transformers_or_a_folder_of_diffusers_pipelines() -> None:
    allowed = {"diffusers": "diffusers", "transformers": "transformers", "ltx2": "diffusers.pipelines.ltx2"}
    others = ("os", "mine", "pipelines", "", ".", "..", "ltx2.vocoder", "../pipelines/ltx2", "ltx2/", "LTX2")
    assert {name: module_of(name) for name in (*allowed, *others)} == allowed | dict.fromkeys(others)


def test_the_facts_are_read_without_torch() -> None:
    code = (
        "import sys; from tetriserve.models.generic.signature import configuration_of; "
        "assert configuration_of('AutoencoderKLMochi')['temporal_expansions'] == (1, 2, 3); "
        "assert configuration_of('NoModel') == {} == configuration_of('../x'); "
        "assert not {'torch', 'diffusers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
