"""The model families that can be served: the only list of them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, cast

from tetriserve.core.errors import CheckpointError, ConfigError
from tetriserve.core.request import MP4, RAW_PIXELS, Request, Shape, Stage, VideoOptions
from tetriserve.core.stages import from_images
from tetriserve.models.card import ModelCard
from tetriserve.models.family import Family, Guidance
from tetriserve.models.flux.facts import FLUX
from tetriserve.models.flux2.facts import FLUX2
from tetriserve.models.flux_kontext.facts import FLUX_KONTEXT
from tetriserve.models.generic.facts import GENERIC
from tetriserve.models.qwen_image.facts import QWEN_IMAGE
from tetriserve.models.qwen_image_edit.facts import QWEN_IMAGE_EDIT
from tetriserve.models.sd3.facts import SD3
from tetriserve.models.wan.facts import WAN
from tetriserve.models.z_image.facts import Z_IMAGE

if TYPE_CHECKING:
    import torch

    from tetriserve.models.adapter import Adapter

FAMILIES = (FLUX, FLUX_KONTEXT, FLUX2, QWEN_IMAGE, QWEN_IMAGE_EDIT, SD3, WAN, Z_IMAGE, GENERIC)
_BY_NAME = {family.name: family for family in FAMILIES}


def check_adapter(name: str) -> None:
    """Raises: ConfigError: no family has that name."""
    if name not in _BY_NAME:
        raise ConfigError(f"adapter is {name[:200]!r}; allowed: {', '.join(_BY_NAME)}")


def find_family(pipeline_class: str, name: str | None = None) -> Family:
    """The family that serves `pipeline_class`; `name` is that of the only one to be taken.

    Raises:
        ConfigError: no family has that name.
        CheckpointError: none serves the class, or not the one named; the message lists what can be done.
    """
    if name is not None:
        check_adapter(name)
        family = _BY_NAME[name]
        if family.takes_any_class or pipeline_class in family.pipeline_classes:
            return family
        raise CheckpointError(
            f"adapter {name!r} serves {', '.join(family.pipeline_classes)}, not {pipeline_class[:200]!r}; leave out "
            "--adapter, or try --adapter generic"
        )
    for family in FAMILIES:
        if pipeline_class in family.pipeline_classes:
            return family
    supported = ", ".join(sorted(name for family in FAMILIES for name in family.pipeline_classes))
    raise CheckpointError(
        f"no adapter serves pipeline class {pipeline_class!r}; supported: {supported}; or try --adapter generic"
    )


def family_of(card: ModelCard) -> Family:
    """The rules that go with the card's values."""
    return _BY_NAME[card.family]


def stages_of(
    card: ModelCard, shape: Shape, num_steps: int, guidance: Guidance, images: Sequence[Shape] = ()
) -> tuple[Stage, ...]:
    """What a request of `num_steps` steps goes through that brings pictures of the shapes `images`."""
    family = family_of(card)
    stages = family.stages(card, num_steps, guidance)
    if not images:
        return stages
    conditions = family.condition_shapes(card, images)
    if not conditions:
        return from_images(stages, 1)
    num_pixels = sum(each.num_pixels for each in (shape, *conditions))
    together = Shape(card.size_multiple, num_pixels // card.size_multiple)
    return from_images(stages, len(images), conditions[0], together)


def dummy_request(
    card: ModelCard, shape: Shape, request_id: str, num_steps: int, images: Sequence[Shape] = ()
) -> Request:
    """One to measure or to warm up with: a pass a step. Pictures of the heights and widths of `images` come along."""
    num_steps, guidance = max(num_steps, card.min_num_steps), Guidance(card.one_pass_scale)
    images = tuple(Shape(image.height, image.width) for image in images)
    return Request(
        request_id=request_id, prompt="a picture", shape=shape, images=images,
        stages=stages_of(card, shape, num_steps, guidance, images), seed=0, arrival_s=0.0, deadline_s=0.0,
        guidance_scale=guidance.scale, model=card.key, media_type=MP4 if card.makes_videos else RAW_PIXELS,
        video=VideoOptions(card.default_fps) if card.makes_videos else None,
    )  # fmt: skip


def load_adapter(
    card: ModelCard, device: torch.device | str, target: str | None = None, *, has_text_encoders: bool = True
) -> Adapter:
    """Load the checkpoint onto `device`. Imports torch and diffusers, so only a worker calls it.

    `target` (`module:Class`) overrides the adapter of the checkpoint's family. Without text encoders it has every stage
    but encode, and neither they nor their tokenizers are loaded.

    Raises:
        CheckpointError: the files of the checkpoint cannot be loaded.
    """
    module, _, name = (target or family_of(card).adapter).partition(":")
    adapter = getattr(import_module(module), name)
    made = adapter(card, device) if has_text_encoders else adapter(card, device, has_text_encoders=False)
    return cast("Adapter", made)
