"""Wan 2.1, 2.2 A14B and TI2V-5B, from texts and from a picture, by classes and layout."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.families.case import FamilyCase
from tetriserve.core.request import Request
from tetriserve.examples import small_wan


def call(pipeline: Any, request: Request, length: int) -> Mapping[str, Any]:
    scale_2 = None if request.video is None else request.video.guidance_scale_2
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "guidance_scale": request.guidance_scale,
        "height": request.shape.height,
        "width": request.shape.width,
        "num_frames": request.shape.frames,
        "max_sequence_length": length,
        **({} if scale_2 is None else {"guidance_scale_2": scale_2}),
    }


def _build(path: Path, kind: str) -> None:
    small_wan.build(path, kind)


def _case(name: str, kind: str, **options: Any) -> FamilyCase:
    return FamilyCase(
        name=name,
        build=partial(_build, kind=kind),
        call=call,
        guided={"guidance_scale": 5.0},
        in_float32=("vae", "image_encoder"),
        **options,
    )


PICTURES = ((123, 301),)
WAN = _case("wan-2.1", "t2v")
WAN_A14B = _case("wan-2.2-a14b", "t2v-a14b")
WAN_5B = _case("wan-2.2-ti2v-5b", "ti2v-5b", pictures=PICTURES, picture_pipeline="WanImageToVideoPipeline")
WAN_FROM_IMAGE = _case(
    "wan-2.1-i2v",
    "i2v",
    pictures=PICTURES,
    num_text_tokens=512,  # the transformer counts so many
)
WAN_A14B_FROM_IMAGE = _case("wan-2.2-i2v-a14b", "i2v-a14b", pictures=PICTURES)
