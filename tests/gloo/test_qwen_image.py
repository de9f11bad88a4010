"""What Qwen-Image and its editing pipelines have of their own."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
    CONDITION_IMAGE_SIZE,
    VAE_IMAGE_SIZE,
    calculate_dimensions,
)

import tetriserve.models.preload  # noqa: F401  as in workers
from tests.families.qwen_image import QWEN_IMAGE, QWEN_IMAGE_EDIT_PLUS
from tests.gloo.test_families import Tiny, built, denoise, request_of
from tetriserve.core.errors import CheckpointError, InvalidRequest
from tetriserve.core.request import Shape
from tetriserve.models.checkpoint import read_card
from tetriserve.models.execution import compile_blocks
from tetriserve.models.qwen_image_edit.facts import READ_PIXELS, STEP_PIXELS, condition_shapes, resized
from tetriserve.models.registry import dummy_request, load_adapter


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return built(QWEN_IMAGE, tmp_path_factory.mktemp("qwen-image"))


@pytest.fixture(scope="module")
def tiny_edit(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return built(QWEN_IMAGE_EDIT_PLUS, tmp_path_factory.mktemp("qwen-image-edit-plus"))


def test_pictures_are_resized_as_the_pipeline_resizes_them() -> None:
    assert (STEP_PIXELS, READ_PIXELS) == (VAE_IMAGE_SIZE, CONDITION_IMAGE_SIZE)
    for height in range(16, 2000, 37):
        for width in (16, 64, 301, 1024, 1999):
            for area in (STEP_PIXELS, READ_PIXELS):
                theirs = calculate_dimensions(area, width / height)
                ours = resized(Shape(height, width), area)
                assert (ours.width, ours.height) == theirs


def test_a_picture_that_is_too_narrow_is_refused_with_its_size(tiny_edit: Tiny) -> None:
    card = tiny_edit.card
    assert condition_shapes(card, [Shape(16, 1600)])[0].num_pixels > 0
    with pytest.raises(InvalidRequest, match="a picture of 1616x16 came along; allowed: 100 times as long as wide"):
        condition_shapes(card, [Shape(64, 64), Shape(16, 1616)])


def test_a_stretched_schedule_has_two_steps_at_least(tiny: Tiny) -> None:
    assert tiny.card.min_num_steps == 2
    scheduler = type(tiny.adapter().pipeline.scheduler).from_config(tiny.adapter().pipeline.scheduler.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timesteps = tiny.adapter().set_timesteps(scheduler, request_of(tiny.card, num_steps=1))
    assert timesteps.isnan().all()
    assert dummy_request(tiny.card, Shape(64, 96), "warm-up", 1).num_steps == 2
    (tiny.card.path / "tetriserve.json").write_text(json.dumps({"num_steps": 1}))
    with pytest.raises(CheckpointError, match="num_steps is 1; allowed: 2 to"):
        read_card(tiny.card.path)


def test_a_schedule_that_is_not_stretched_may_have_one_step(tiny: Tiny, tmp_path: Path) -> None:
    path = copied(tiny, tmp_path, "scheduler/scheduler_config.json", shift_terminal=None)
    assert read_card(path).min_num_steps == 1


def test_text_is_counted_as_it_is_embedded_and_cut_at_the_length_that_was_asked_for(
    tiny: Tiny, tiny_edit: Tiny
) -> None:
    picture = torch.zeros(64, 64, 3, dtype=torch.uint8)
    for case, images in ((tiny, ()), (tiny_edit, ()), (tiny_edit, (picture,))):
        adapter = case.adapter()
        for prompt, num_tokens in (("", 5), ("a red circle", 8)):
            request = case.request(prompt=prompt)
            before = 0 if not images else embedded(adapter, case.request(prompt=""), images) - 5
            assert adapter.count_text(request).num_tokens == num_tokens
            assert embedded(adapter, request, images) == before + num_tokens
            cut = case.request(prompt=prompt, max_sequence_length=4)
            assert adapter.count_text(cut).is_truncated
            assert embedded(adapter, cut, images) == before + 4


def embedded(adapter: object, request: object, images: object) -> int:
    return int(adapter.encode(request, images)["prompt_embeds"].shape[1])  # type: ignore[attr-defined]


def test_compiled_blocks_make_the_same_latents(tiny: Tiny, tiny_edit: Tiny) -> None:
    for case in (tiny, tiny_edit):
        compiled = load_adapter(case.card, "cpu")
        compile_blocks(compiled.pipeline.transformer, backend="aot_eager")  # type: ignore[attr-defined]
        for prompt in ("red", "a red circle"):
            request = case.guided(prompt=prompt)
            assert (denoise(compiled, request) - denoise(case.adapter(), request)).abs().max() < 1e-4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("file", "change", "line"),
    [
        (
            "transformer/config.json",
            {"guidance_embeds": True},
            "guidance_embeds is true; .* needs false",
        ),
        ("transformer/config.json", {"use_layer3d_rope": True}, "use_layer3d_rope is true; .* needs false"),
        ("transformer/config.json", {"in_channels": 64}, "in_channels is 64, but QwenImagePipeline needs 16"),
        ("transformer/config.json", {"out_channels": 16}, "out_channels is 16, but QwenImagePipeline needs 4"),
        ("transformer/config.json", {"patch_size": 1}, "patch_size is 1, but QwenImagePipeline needs 2"),
        ("transformer/config.json", {"joint_attention_dim": 48}, "joint_attention_dim is 48, but text_encoder makes"),
        ("transformer/config.json", {"num_layers": 3}, "num_layers is 3, but the weights lack transformer_blocks.2"),
        ("vae/config.json", {"latents_std": [1, 1, 1]}, r"latents_std is \[1, 1, 1\]; it must be 4 numbers"),
        ("vae/config.json", {"latents_std": [1, 1, 1, 0]}, "none may be 0"),
        ("vae/config.json", {"temperal_downsample": [True]}, "must have one item less than dim_mult"),
    ],
)
def test_what_cannot_be_driven_ends_the_start_in_one_line(
    tiny: Tiny, tmp_path: Path, file: str, change: dict[str, object], line: str
) -> None:
    with pytest.raises(CheckpointError, match=line) as caught:
        read_card(copied(tiny, tmp_path, file, **change))
    assert "\n" not in str(caught.value)
    assert file in str(caught.value)


def test_a_processor_without_vocabulary_or_without_rules_for_pictures_ends_the_start_in_one_line(
    tiny_edit: Tiny, tmp_path: Path
) -> None:
    for name, line in (("tokenizer.json", "has no vocabulary"), ("preprocessor_config.json", "has no preprocessor")):
        path = copied(tiny_edit, tmp_path / name, f"processor/{name}")
        (path / "processor" / name).unlink()
        with pytest.raises(CheckpointError, match=f"processor {line}") as caught:
            read_card(path)
        assert "\n" not in str(caught.value)


def copied(tiny: Tiny, path: Path, file: str, **change: object) -> Path:
    """The checkpoint, with a copy of one JSON file in which keys are changed."""
    path.mkdir(exist_ok=True)
    component, name = file.split("/")
    (path / component).mkdir()
    for source in (*tiny.card.path.iterdir(), *(tiny.card.path / component).iterdir()):
        target = path / source.relative_to(tiny.card.path)
        if source.name not in (component, "tetriserve.json", name):
            target.symlink_to(source)
    content = json.loads((tiny.card.path / file).read_text())
    (path / file).write_text(json.dumps(content | change))
    return path
