"""Faults that only checkpoints of one family can have: each ends the start in one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.families.case import FamilyCase
from tests.families.flux2 import FLUX2_DEV, FLUX2_KLEIN
from tests.families.wan import WAN, WAN_5B, WAN_A14B, WAN_FROM_IMAGE
from tests.families.z_image import Z_IMAGE
from tetriserve.core.errors import CheckpointError, InvalidRequest
from tetriserve.core.request import Shape
from tetriserve.models.checkpoint import read_card
from tetriserve.models.registry import family_of


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults")
    for case in (FLUX2_DEV, FLUX2_KLEIN, WAN, WAN_5B, WAN_A14B, WAN_FROM_IMAGE, Z_IMAGE):
        case.build(path / case.name)
    return path


FAULTS: list[tuple[FamilyCase, str, dict[str, Any], str]] = [
    (Z_IMAGE, "transformer", {"axes_lens": [512, 64, 64]}, "axes_lens is [512, 64, 64]; the first must be 514 or more"),
    (Z_IMAGE, "transformer", {"axes_lens": [600, 64]}, "axes_lens is [600, 64]; it must be three numbers above 0"),
    (Z_IMAGE, "transformer", {"n_refiner_layers": 1}, "n_refiner_layers is 1"),
    (Z_IMAGE, "transformer", {"cap_feat_dim": 25}, "cap_feat_dim is 25, but text_encoder makes embeddings of 24"),
    (Z_IMAGE, "vae", {"latent_channels": 8}, "in_channels is 4, but ZImagePipeline needs 8"),
    (FLUX2_KLEIN, "transformer", {"joint_attention_dim": 8}, "joint_attention_dim is 8, but text_encoder"),
    (FLUX2_KLEIN, "text_encoder", {"num_hidden_layers": 26}, "the states after layer 27 are needed"),
    (FLUX2_KLEIN, "text_encoder", {"num_hidden_layers": 29}, "num_hidden_layers is 29, but the weights lack layers.28"),
    (FLUX2_DEV, "text_encoder", {"text_config": {"hidden_size": 8, "num_hidden_layers": 29}}, "after layer 30"),
    (FLUX2_DEV, "transformer", {"num_single_layers": 3}, "the weights lack single_transformer_blocks.2"),
    (WAN, "transformer", {"in_channels": 36}, "in_channels is 36, but WanPipeline needs 16 (z_dim of the vae is 16)"),
    (WAN, "transformer", {"patch_size": [1, 4, 4]}, "patch_size is [1, 4, 4], but WanPipeline needs [1, 2, 2]"),
    (WAN, "transformer", {"text_dim": 64}, "text_dim is 64, but text_encoder makes embeddings of 32"),
    (WAN, "transformer", {"num_layers": 3}, "num_layers is 3, but the weights lack blocks.2"),
    (WAN, "transformer", {"image_dim": 8}, "image_dim is 8, but WanPipeline gives it no picture's embeddings"),
    (WAN, "vae", {"latents_std": [0] * 16}, "none may be 0"),
    (WAN, "vae", {"latents_mean": [0.0]}, "latents_mean is [0.0]; it must be 16 numbers"),
    (WAN, "vae", {"scale_factor_spatial": 16}, "scale_factor_spatial is 16, but its blocks make it 8"),
    (WAN_5B, "vae", {"temperal_downsample": [False, False, True], "scale_factor_temporal": 2}, "works with 4"),
    (WAN_A14B, "transformer_2", {"num_layers": 1}, "num_layers is 1, but the weights have blocks.1"),
    (WAN_A14B, "transformer_2", {"num_attention_heads": 8}, "num_attention_heads is 8, but that of transformer is 4"),
    (WAN_FROM_IMAGE, "image_encoder", {"hidden_size": 8}, "image_encoder makes embeddings of 8"),
    (WAN_FROM_IMAGE, "transformer", {"pos_embed_seq_len": 514}, "models of a first and a last frame are not served"),
]


@pytest.mark.parametrize(
    ("case", "file", "changes", "line"),
    [
        (
            WAN_A14B,
            "model_index.json",
            {"boundary_ratio": None},
            "boundary_ratio is null, but there is a transformer_2",
        ),
        (
            WAN_A14B,
            "model_index.json",
            {"boundary_ratio": 1.5},
            "boundary_ratio is 1.5; it must be a number from 0 to 1",
        ),
        (WAN, "model_index.json", {"boundary_ratio": 0.9}, "boundary_ratio is 0.9, but transformer_2 is missing"),
        (WAN, "model_index.json", {"expand_timesteps": 1}, "expand_timesteps is 1; it must be true or false"),
        (WAN_FROM_IMAGE, "model_index.json", {"image_encoder": [None, None]}, "image_encoder is [null, null], but"),
        (WAN, "scheduler/scheduler_config.json", {"use_flow_sigmas": False}, "use_flow_sigmas is false; the models"),
        (WAN, "scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, 'need "flow_prediction"'),
        (WAN, "scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting is true"),
        (WAN, "tetriserve.json", {"sizes": ["64x64x8"]}, "sizes ['64x64x8'] are not possible; list at least one, each"),
        (WAN, "tetriserve.json", {"sizes": ["64x64x165"]}, "and 1 + a multiple of 4 frames, at most 161"),
        (WAN, "tetriserve.json", {"sizes": ["64x64xmany"]}, "'64x64xmany' is not of the form WIDTHxHEIGHTxFRAMES"),
    ],
)
def test_files_that_do_not_make_a_video_end_the_start(
    root: Path, case: FamilyCase, file: str, changes: dict[str, Any], line: str
) -> None:
    path = root / case.name / file
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | changes))
    try:
        with pytest.raises(CheckpointError) as caught:
            read_card(root / case.name)
    finally:
        path.write_text(before)
    assert line in str(caught.value)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_of_videos_have_frames(root: Path) -> None:
    path = root / WAN.name / "tetriserve.json"
    before = path.read_text()
    path.write_text(json.dumps({"sizes": ["96x64x9", "64x64", "64x64x1"]}))
    sizes = read_card(root / WAN.name).sizes
    path.write_text(before)
    assert sizes == (Shape(64, 96, 9), Shape(64, 64, 81), Shape(64, 64, 1))


@pytest.mark.parametrize(("case", "component", "changes", "line"), FAULTS)
def test_parts_that_do_not_fit_end_the_start(
    root: Path, case: FamilyCase, component: str, changes: dict[str, Any], line: str
) -> None:
    file = root / case.name / component / "config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | changes))
    try:
        with pytest.raises(CheckpointError) as caught:
            read_card(root / case.name)
    finally:
        file.write_text(before)
    assert line in str(caught.value)
    assert component in str(caught.value) or "transformer" in str(caught.value)
    assert "\n" not in str(caught.value)
    read_card(root / case.name)


@pytest.mark.parametrize("case", [FLUX2_DEV, Z_IMAGE], ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_tokenizer_without_its_vocabulary_or_template_ends_the_start(root: Path, case: FamilyCase, name: str) -> None:
    file = root / case.name / "tokenizer" / name
    content = file.read_bytes()
    file.unlink()
    try:
        with pytest.raises(CheckpointError, match=f"tokenizer has no .*{name}"):
            read_card(root / case.name)
    finally:
        file.write_bytes(content)


def test_pictures_take_part_in_flux_2_as_large_as_its_pipelines_make_them(root: Path) -> None:
    card = read_card(root / FLUX2_KLEIN.name)
    shapes = family_of(card).condition_shapes
    assert shapes(card, [Shape(80, 100), Shape(1024, 1024)]) == (Shape(80, 96), Shape(1024, 1024))
    assert shapes(card, [Shape(2000, 1000)]) == (Shape(1440, 720),)
    for shape in (Shape(63, 100), Shape(100, 801)):
        with pytest.raises(InvalidRequest, match=f"a picture of {shape} came along"):
            shapes(card, [shape])
