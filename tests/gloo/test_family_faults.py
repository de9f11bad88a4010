"""Faults that only checkpoints of one family can have: each ends the start in one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.families.case import FamilyCase
from tests.families.flux2 import FLUX2_DEV, FLUX2_KLEIN
from tests.families.z_image import Z_IMAGE
from tetriserve.core.errors import CheckpointError, InvalidRequest
from tetriserve.core.request import Shape
from tetriserve.models.checkpoint import read_card
from tetriserve.models.registry import family_of


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults")
    for case in (FLUX2_DEV, FLUX2_KLEIN, Z_IMAGE):
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
]


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
