"""A damaged checkpoint ends the start, for every component and kind of damage: no weights are filled in or left out."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tetriserve.core.errors import CheckpointError
from tetriserve.models.checkpoint import read_card
from tetriserve.models.registry import load_adapter

Tensors = dict[str, torch.Tensor]


def edit(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(file)), file)


def without_last(tensors: Tensors) -> Tensors:
    return {name: tensors[name] for name in sorted(tensors)[:-1]}


def with_another(tensors: Tensors) -> Tensors:
    return tensors | {"zz.lora_A.weight": torch.zeros(2)}


def prefixed(tensors: Tensors) -> Tensors:
    return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}


def reshaped(tensors: Tensors) -> Tensors:
    """As many numbers, in one row."""
    name = max(tensors)
    return tensors | {name: tensors[name].reshape(1, -1)}


def narrowed(tensors: Tensors) -> Tensors:
    name = max(tensors)
    return tensors | {name: tensors[name][:-1].clone()}


DAMAGES = {
    "a tensor missing": without_last,
    "a tensor left over": with_another,
    "every name with PEFT's prefix": prefixed,
    "a tensor reshaped": reshaped,
    "a tensor too narrow": narrowed,
}
MODELS = ("text_encoder", "text_encoder_2", "transformer", "vae")


@pytest.fixture
def checkpoint(bundled_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundled_dir, tmp_path / "spoilt")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("component", MODELS)
def test_damaged_weights_end_the_start_in_one_line_that_names_folder_and_tensor(
    checkpoint: Path, component: str, damage: str
) -> None:
    (file,) = (checkpoint / component).glob("*.safetensors")
    edit(file, DAMAGES[damage])
    with pytest.raises(CheckpointError) as caught:
        load_adapter(read_card(checkpoint), "cpu")
    message = str(caught.value)
    assert str(checkpoint / component) in message
    assert "\n" not in message
    assert re.search(r"'[\w.]+'|\b\w+\.\w+(\.\w+)* expected shape|lack [\w.]+\.\d", message), message


def test_a_text_encoder_configured_with_more_layers_than_it_has_weights_is_refused(checkpoint: Path) -> None:
    card = read_card(checkpoint)
    file = checkpoint / "text_encoder_2/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_layers": 4}))
    with pytest.raises(CheckpointError, match=r"num_layers is 4, but the weights lack encoder\.block\.3"):
        read_card(checkpoint)
    with pytest.raises(CheckpointError, match=r"text_encoder_2: the weights lack 'encoder\.block\.3\.layer\.0"):
        load_adapter(card, "cpu")


@pytest.mark.parametrize("number", ["", "_2"])
def test_a_vocabulary_that_makes_all_texts_alike_is_refused(checkpoint: Path, number: str) -> None:
    file = checkpoint / f"tokenizer{number}/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokenizer["model"] |= {"vocab": special, "merges": []}
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=f"tokenizer{number} and text_encoder{number} do not tell") as caught:
        load_adapter(read_card(checkpoint), "cpu")
    assert "\n" not in str(caught.value)


def test_a_vocabulary_larger_than_the_text_encoder_is_refused(checkpoint: Path) -> None:
    file = checkpoint / "tokenizer_2/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["one-too-many"] = 704
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="tokenizer_2 has 705 tokens, but text_encoder_2 knows 704"):
        load_adapter(read_card(checkpoint), "cpu")


@pytest.mark.parametrize("text", ["{}", '{"model": {"type": "BPE"}}'])
def test_whatever_a_library_raises_is_one_line(checkpoint: Path, text: str) -> None:
    (checkpoint / "tokenizer_2/tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="spoilt") as caught:
        load_adapter(read_card(checkpoint), "cpu")
    assert "\n" not in str(caught.value)


def test_what_fails_on_the_way_to_the_device_is_one_line_too(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="spoilt cannot be loaded: .+") as caught:
        load_adapter(read_card(checkpoint), "cuda:99")
    assert "\n" not in str(caught.value)


def test_weights_stored_as_a_variant_are_loaded(checkpoint: Path, bundled_dir: Path) -> None:
    for component in ("transformer", "text_encoder"):
        (file,) = (checkpoint / component).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))
    adapter = load_adapter(read_card(checkpoint), "cpu")
    reference = load_adapter(dataclasses.replace(read_card(bundled_dir)), "cpu")
    for component in MODELS:
        ours, theirs = (getattr(each.pipeline, component).state_dict() for each in (adapter, reference))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
