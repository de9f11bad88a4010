"""`read_card` on checkpoints made of JSON and empty weights: the facts, and one clear line for each thing wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tetriserve.core.errors import CheckpointError
from tetriserve.core.execution import Execution
from tetriserve.core.request import Shape
from tetriserve.models.card import ModelCard
from tetriserve.models.checkpoint import check_unchanged, read_card
from tetriserve.models.files import find_weights
from tetriserve.models.flux.facts import FLUX

MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
TRANSFORMER = {
    "_diffusers_version": "0.42.1",
    "num_attention_heads": 24,
    "num_layers": 3,
    "num_single_layers": 2,
    "guidance_embeds": True,
}
VAE = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1}
CLIP = {"hidden_size": 768, "num_hidden_layers": 2, "max_position_embeddings": 77, "dtype": "bfloat16"}
T5 = {"d_model": 4096, "num_layers": 2, "dtype": "bfloat16"}
TENSORS = {
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": [
        "transformer_blocks.0.a", "transformer_blocks.1.a"
    ],
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors": [
        "transformer_blocks.2.a", "single_transformer_blocks.0.a", "single_transformer_blocks.1.a"
    ],
    "text_encoder/model.safetensors": ["text_model.encoder.layers.0.a", "text_model.encoder.layers.1.a"],
    "text_encoder_2/model.safetensors": ["shared.weight", "encoder.block.0.layer.0.a", "encoder.block.1.layer.0.a"],
    "vae/diffusion_pytorch_model.safetensors": ["decoder.conv_in.weight"],
}  # fmt: skip
SHARDS = "transformer/diffusion_pytorch_model.safetensors.index.json"


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_weights(file: Path, header: bytes = b"{}", data: bytes = b"") -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


def write_tensors(file: Path, names: Iterable[str], dtype: str = "BF16") -> None:
    """A safetensors file of empty tensors."""
    header = {name: {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]} for name in names}
    write_weights(file, json.dumps(header).encode())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A complete FLUX.1-dev look-alike, its transformer sharded."""
    path = tmp_path / "flux-dev"
    write_json(path / "model_index.json", MODEL_INDEX)
    write_json(path / "scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    write_json(path / "tokenizer/tokenizer_config.json", {"model_max_length": 77})
    write_json(path / "tokenizer/vocab.json", {"a": 0})
    (path / "tokenizer/merges.txt").write_text("")
    write_json(path / "tokenizer_2/tokenizer_config.json", {"model_max_length": 512})
    write_json(path / "tokenizer_2/tokenizer.json", {})
    write_json(path / "transformer/config.json", TRANSFORMER)
    write_json(path / "vae/config.json", VAE)
    write_json(path / "text_encoder/config.json", CLIP)
    write_json(path / "text_encoder_2/config.json", T5)
    for file, names in TENSORS.items():
        write_tensors(path / file, names)
    write_json(
        path / SHARDS, {"weight_map": {name: Path(file).name for file in list(TENSORS)[:2] for name in TENSORS[file]}}
    )
    return path


def test_a_guidance_distilled_flux_reads_as_flux_dev(checkpoint: Path) -> None:
    card = read_card(checkpoint)
    assert card == ModelCard(
        name="flux-dev",
        path=checkpoint,
        family="flux",
        pipeline_class="FluxPipeline",
        execution=Execution("bfloat16"),
        size_multiple=16,
        pixels_per_token=16,
        num_heads=24,
        num_text_tokens=512,
        default_num_steps=28,
        default_guidance_scale=3.5,
        has_guidance=True,
        has_negative_prompt=True,
        max_images=1,
        default_strength=0.6,
        sizes=(Shape(1024, 1024), Shape(256, 256), Shape(512, 512), Shape(2048, 2048)),
        fingerprint=card.fingerprint,
        stamp=card.stamp,
    )
    assert len(card.fingerprint) == 12
    assert FLUX.num_tokens(card, Shape(1024, 512)) == 64 * 32
    assert card.valid_degrees((1, 2, 3, 4, 5, 8, 16)) == (1, 2, 3, 4, 8)


def test_a_flux_without_guidance_embeds_reads_as_flux_schnell(checkpoint: Path) -> None:
    write_json(checkpoint / "transformer/config.json", TRANSFORMER | {"guidance_embeds": False})
    card = read_card(checkpoint)
    assert (card.default_num_steps, card.has_guidance) == (4, False)


def test_text_tokens_are_512_as_in_the_pipeline_whatever_the_tokenizer_holds(checkpoint: Path) -> None:
    for model_max_length in (64, 512, 1e30):
        write_json(checkpoint / "tokenizer_2/tokenizer_config.json", {"model_max_length": model_max_length})
        assert read_card(checkpoint).num_text_tokens == 512
    write_json(checkpoint / "tetriserve.json", {"max_sequence_length": 40})
    assert read_card(checkpoint).num_text_tokens == 40


@pytest.mark.parametrize(("num_vae_blocks", "side"), [(4, 1024), (5, 2048), (3, 512)])
def test_the_default_size_is_that_of_the_pipeline(checkpoint: Path, num_vae_blocks: int, side: int) -> None:
    write_json(checkpoint / "vae/config.json", VAE | {"block_out_channels": [64] * num_vae_blocks})
    sizes = read_card(checkpoint).sizes
    assert sizes[0] == Shape(side, side)
    assert len(sizes) == len(set(sizes))


@pytest.mark.parametrize("parts", [("text_encoder",), ("vae",), ("text_encoder", "text_encoder_2", "vae")])
def test_weights_that_are_there_as_a_variant_only_are_the_variant(checkpoint: Path, parts: tuple[str, ...]) -> None:
    for part in parts:
        (file,) = (checkpoint / part).glob("*.safetensors")
        file.rename(file.with_suffix(".fp16.safetensors"))
        library = MODEL_INDEX[part][0]
        assert find_weights(checkpoint / part, library).variant == "fp16"
    read_card(checkpoint)


def test_a_sharded_variant_is_found_by_its_index(checkpoint: Path) -> None:
    (checkpoint / SHARDS).rename((checkpoint / SHARDS).with_suffix(".fp16.json"))
    assert find_weights(checkpoint / "transformer", "diffusers").variant == "fp16"
    read_card(checkpoint)


def test_weights_without_a_variant_are_taken_before_one(checkpoint: Path) -> None:
    write_tensors(checkpoint / "vae/diffusion_pytorch_model.fp16.safetensors", ["a"])
    assert find_weights(checkpoint / "vae", "diffusers").variant is None


def test_a_hub_folder_is_its_only_snapshot_under_the_name_of_the_model(checkpoint: Path) -> None:
    hub = checkpoint.parent / "models--black-forest-labs--FLUX.1-dev"
    snapshot = hub / "snapshots/0ef5fff7"
    snapshot.parent.mkdir(parents=True)
    checkpoint.rename(snapshot)
    for path in (hub, snapshot):
        card = read_card(path)
        assert (card.name, card.path) == ("black-forest-labs/FLUX.1-dev", snapshot)
    shutil.copytree(snapshot, hub / "snapshots/1abc")
    with pytest.raises(CheckpointError, match=r"holds 2 snapshots; give one, such as .*snapshots/0ef5fff7"):
        read_card(hub)


def test_a_model_answers_to_its_names_its_path_and_default(checkpoint: Path) -> None:
    card = dataclasses.replace(read_card(checkpoint), name="dev", aliases=("flux",))
    assert [card.is_called(name) for name in ("dev", "flux", "default", str(checkpoint))] == [True] * 4
    assert [card.is_called(name) for name in ("", "flux-dev", "fluxx")] == [False] * 3


@pytest.mark.parametrize("file", ["vae/config.json", "tokenizer_2/tokenizer.json", "text_encoder/model.safetensors"])
def test_a_worker_notices_that_a_file_was_replaced_or_removed_after_the_server_read_it(
    checkpoint: Path, file: str
) -> None:
    card = read_card(checkpoint)
    check_unchanged(card)
    content = (checkpoint / file).read_bytes()
    (checkpoint / file).unlink()
    with pytest.raises(CheckpointError, match="flux-dev was changed after the server started; restart the server"):
        check_unchanged(card)
    (checkpoint / file).write_bytes(content)
    os.utime(checkpoint / file, ns=(1, 1))
    with pytest.raises(CheckpointError, match="was changed"):
        check_unchanged(card)


def test_tetriserve_json_overrides_the_defaults(checkpoint: Path) -> None:
    overrides = {"name": "dev", "num_steps": 20, "guidance_scale": 2, "sizes": ["512x256"], "dtype": "float32"}
    write_json(checkpoint / "tetriserve.json", overrides)
    card = read_card(checkpoint)
    assert (card.name, card.default_num_steps, card.default_guidance_scale) == ("dev", 20, 2.0)
    assert card.execution == Execution("float32")
    assert card.sizes == (Shape(height=256, width=512),)


def test_the_fingerprint_follows_the_architecture_and_nothing_else(checkpoint: Path) -> None:
    before = read_card(checkpoint).fingerprint
    write_json(checkpoint / "transformer/config.json", TRANSFORMER | {"_diffusers_version": "1.0"})
    write_json(checkpoint / "text_encoder/config.json", CLIP | {"dtype": "float32"})
    write_json(checkpoint / "tetriserve.json", {"name": "other", "num_steps": 5})
    assert read_card(checkpoint).fingerprint == before
    write_json(checkpoint / "transformer/config.json", TRANSFORMER | {"num_attention_heads": 12})
    assert read_card(checkpoint).fingerprint != before


def put(name: str, text: str) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_text(text)


def put_json(name: str, content: Any) -> Callable[[Path], Any]:
    return lambda path: write_json(path / name, content)


def remove(name: str) -> Callable[[Path], Any]:
    return lambda path: shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()


def rename(name: str, other: str) -> Callable[[Path], Any]:
    def spoil(path: Path) -> None:
        (path / other).parent.mkdir(parents=True, exist_ok=True)
        (path / name).rename(path / other)

    return spoil


def several_variants(path: Path) -> None:
    file = path / "vae/diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_suffix(".fp16.safetensors"))
    file.rename(file.with_suffix(".bf16.safetensors"))


def gguf(path: Path) -> None:
    for file in (path / "transformer").glob("*model*"):
        file.unlink()
    (path / "transformer/flux-q4.gguf").write_bytes(b"GGUF")


def only_bin(path: Path) -> None:
    (path / "vae/diffusion_pytorch_model.safetensors").rename(path / "vae/diffusion_pytorch_model.bin")


def cut_short(path: Path) -> None:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    write_weights(path / "vae/diffusion_pytorch_model.safetensors", header, data=b"12345678")


def only_pt(path: Path) -> None:
    only_bin(path)
    (path / "vae/diffusion_pytorch_model.bin").rename(path / "vae/diffusion_pytorch_model.pt")


def pickle_in_the_index(path: Path) -> None:
    index = path / "transformer/diffusion_pytorch_model.safetensors.index.json"
    (path / "transformer/weights.bin").write_bytes(b"\x80\x04.")
    write_json(index, {"weight_map": {"a": "weights.bin"}})


def weights_elsewhere(path: Path) -> None:
    write_weights(path.parent / "other.safetensors")
    write_json(
        path / "transformer/diffusion_pytorch_model.safetensors.index.json",
        {"weight_map": {"a": "../../other.safetensors"}},
    )


def a_sparse_file(path: Path) -> None:
    with (path / "vae/config.json").open("wb") as file:
        file.truncate(2**40)


def a_device(path: Path) -> None:
    (path / "vae/config.json").unlink()
    (path / "vae/config.json").symlink_to("/dev/zero")


def a_pipe(path: Path) -> None:
    (path / "vae/config.json").unlink()
    os.mkfifo(path / "vae/config.json")


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (remove(""), "flux-dev is not a directory; give a directory that holds a diffusers pipeline"),
    "no index": (remove("model_index.json"), "has no model_index.json; give the top directory of a diffusers pipeline"),
    "unsupported class": (
        put_json("model_index.json", MODEL_INDEX | {"_class_name": "StableDiffusionPipeline"}),
        "no adapter serves pipeline class 'StableDiffusionPipeline'; supported: Flux2KleinPipeline, ",
    ),
    "no class": (put_json("model_index.json", {}), "model_index.json: _class_name is null; it must be a JSON string"),
    "malformed JSON": (put("vae/config.json", '{"a": '), "vae/config.json is not valid JSON (Expecting value: line 1"),
    "not an object": (put("vae/config.json", "[]"), "vae/config.json holds no JSON object"),
    "missing key": (
        put("transformer/config.json", "{}"),
        "config.json: num_attention_heads is null; it must be a JSON integer",
    ),
    "missing component": (remove("vae"), "vae is missing though model_index.json names it; download the checkpoint"),
    "missing config": (remove("text_encoder/config.json"), "text_encoder has no config.json; download the checkpoint"),
    "missing weights": (
        remove("text_encoder_2/model.safetensors"),
        "text_encoder_2 has no weights (model.safetensors); download the checkpoint again",
    ),
    "missing shard": (
        remove("transformer/diffusion_pytorch_model-00002-of-00002.safetensors"),
        "diffusion_pytorch_model-00002-of-00002.safetensors is missing though "
        "diffusion_pytorch_model.safetensors.index.json names it",
    ),
    "pickled weights": (only_bin, "vae has its weights as .bin only; safetensors are needed"),
    "cut short": (cut_short, "diffusion_pytorch_model.safetensors is truncated or not a safetensors file"),
    "LFS pointer": (
        put("vae/diffusion_pytorch_model.safetensors", "version https://git-lfs.github.com/spec/v1\nsize 1\n"),
        "diffusion_pytorch_model.safetensors is truncated or not a safetensors file (50 bytes)",
    ),
    "other scheduler": (
        put_json("scheduler/scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"}),
        "scheduler UniPCMultistepScheduler keeps state or draws noise between steps; use FlowMatchEulerDiscrete",
    ),
    "unknown override": (
        put_json("tetriserve.json", {"steps": 3}),
        "tetriserve.json: unknown key 'steps'; allowed: name, num_steps, guidance_scale, sizes, dtype, max",
    ),
    "wrong type": (put_json("tetriserve.json", {"num_steps": True}), "num_steps is true; it must be a JSON integer"),
    "no steps": (put_json("tetriserve.json", {"num_steps": 0}), "num_steps is 0; allowed: 1 to 1000"),
    "too many steps": (
        put_json("tetriserve.json", {"num_steps": 10**400}),
        "num_steps is a number of 1329 bits; allowed: 1",
    ),
    "a guidance beyond floats": (
        put_json("tetriserve.json", {"guidance_scale": 10**400}),
        "guidance_scale is a number of 1329 bits; allowed: 0 to 100",
    ),
    "too many heads": (
        put_json("transformer/config.json", {"num_attention_heads": 10**30}),
        "num_attention_heads is a number of 100 bits; it must be from 1 to 2147483648",
    ),
    "a config without an end": (a_sparse_file, "vae/config.json (Larger than 268435456 bytes); download"),
    "a config that is a device": (a_device, "vae/config.json (Not a regular file); download the checkpoint again"),
    "NaN guidance": (put("tetriserve.json", '{"guidance_scale": NaN}'), "guidance_scale is nan; allowed: 0 to 100"),
    "unknown dtype": (
        put_json("tetriserve.json", {"dtype": "int8"}),
        "dtype is 'int8'; allowed: float32, bfloat16, float16",
    ),
    "malformed size": (put_json("tetriserve.json", {"sizes": ["big"]}), "size 'big' is not of the form WIDTHxHEIGHT"),
    "pickled weights by another name": (only_pt, "vae has its weights as .pt only; safetensors are needed"),
    "pickled shard": (pickle_in_the_index, "index.json: 'weights.bin' is no name of a safetensors file in this"),
    "weights elsewhere": (weights_elsewhere, "'../../other.safetensors' is no name of a safetensors file in this"),
    "code in a component": (
        put_json("vae/config.json", {"block_out_channels": [1, 2], "auto_map": {"AutoModel": "evil.Evil"}}),
        "vae/config.json names code in auto_map; code that models bring is never run: remove it",
    ),
    "code in a tokenizer": (
        put_json("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
        "tokenizer/tokenizer_config.json names code in auto_map",
    ),
    "a module of its own": (
        put_json("model_index.json", MODEL_INDEX | {"vae": ["evil", "Evil"]}),
        'model_index.json: "vae" is ["evil", "Evil"]; allowed: classes of diffusers and transformers; code that models',
    ),
    "a pipeline of its own": (
        put_json("model_index.json", MODEL_INDEX | {"_class_name": ["evil", "FluxPipeline"]}),
        '_class_name is ["evil", "FluxPipeline"]; it must be a JSON string',
    ),
    "a component elsewhere": (
        put_json("model_index.json", MODEL_INDEX | {"../vae": ["diffusers", "AutoencoderKL"]}),
        'model_index.json: "../vae" is ["diffusers", "AutoencoderKL"]; allowed',
    ),
    "a pipe": (a_pipe, "cannot read"),
    "deep JSON": (put("vae/config.json", "[" * 100_000), "vae/config.json is not valid JSON"),
    "a header that is too deep": (
        lambda path: write_weights(path / "vae/diffusion_pytorch_model.safetensors", b'{"a":' + b"[" * 100_000),
        "diffusion_pytorch_model.safetensors is truncated or not a safetensors file",
    ),
    "no VAE": (put_json("vae/config.json", VAE | {"block_out_channels": []}), "has 0 items; allowed: 1 to 8"),
    "a deep VAE": (
        put_json("vae/config.json", VAE | {"block_out_channels": [1] * 60}),
        "block_out_channels has 60 items",
    ),
    "no heads": (
        put_json("transformer/config.json", TRANSFORMER | {"num_attention_heads": 0}),
        "num_attention_heads is 0; it",
    ),
    "no text": (put_json("tetriserve.json", {"max_sequence_length": 0}), "max_sequence_length is 0; allowed: 1 to 512"),
    "long text": (put_json("tetriserve.json", {"max_sequence_length": 513}), "max_sequence_length is 513; allowed: 1"),
    "a name of two lines": (put_json("tetriserve.json", {"name": "a\nb"}), "name is 'a\\nb'; allowed: 1 to 200"),
    "a long name": (put_json("tetriserve.json", {"name": "a" * 201}), "; allowed: 1 to 200 printable characters"),
    "no second text encoder": (
        put_json("model_index.json", MODEL_INDEX | {"text_encoder_2": [None, None]}),
        "model_index.json: text_encoder_2 is [null, null]; FluxPipeline needs it: download the whole checkpoint",
    ),
    "no VAE in the index": (
        put_json("model_index.json", {key: value for key, value in MODEL_INDEX.items() if key != "vae"}),
        "model_index.json: vae is null; FluxPipeline needs it",
    ),
    "no vocabulary of CLIP": (
        remove("tokenizer/vocab.json"),
        "tokenizer has no vocabulary (tokenizer.json, or vocab.json and merges.txt); download the checkpoint again",
    ),
    "no merges of CLIP": (remove("tokenizer/merges.txt"), "tokenizer has no vocabulary (tokenizer.json, or vocab.json"),
    "no vocabulary of T5": (
        remove("tokenizer_2/tokenizer.json"),
        "tokenizer_2 has no vocabulary (tokenizer.json, or spiece.model); download the checkpoint again",
    ),
    "vocabulary cut short": (put("tokenizer_2/tokenizer.json", '{"a'), "tokenizer_2/tokenizer.json is not valid JSON"),
    "several variants only": (
        several_variants,
        "vae has weights in the variants bf16, fp16; leave one of them",
    ),
    "GGUF": (gguf, "transformer has its weights as .gguf only; safetensors are needed: use the checkpoint in bfloat16"),
    "index lost": (
        remove(SHARDS),
        "transformer has diffusion_pytorch_model-00001-of-00002.safetensors but no "
        "diffusion_pytorch_model.safetensors.index.json; download that file",
    ),
    "unfinished download": (
        rename("vae/diffusion_pytorch_model.safetensors", "vae/abc.incomplete"),
        "vae has no weights (diffusion_pytorch_model.safetensors); its download is not finished (",
    ),
    "unfinished download of the hub's client": (
        rename("text_encoder/model.safetensors", ".cache/huggingface/download/text_encoder/abc.incomplete"),
        "text_encoder has no weights (model.safetensors); its download is not finished (",
    ),
    "bitsandbytes": (
        put_json("transformer/config.json", TRANSFORMER | {"quantization_config": {"quant_method": "bitsandbytes"}}),
        'transformer/config.json has a quantization_config ("bitsandbytes"); quantised weights are not served: use the',
    ),
    "eight-bit weights": (
        lambda path: write_tensors(path / "text_encoder/model.safetensors", ["a"], dtype="I8"),
        "text_encoder/model.safetensors: 'a' is I8; quantised weights are not served",
    ),
    "FLUX Fill": (
        put_json("transformer/config.json", TRANSFORMER | {"in_channels": 384, "out_channels": 64}),
        "transformer/config.json: in_channels is 384, but FluxPipeline needs 64 (4 times latent_channels of the vae); ",
    ),
    "other text encoder": (
        put_json("text_encoder/config.json", CLIP | {"hidden_size": 1280}),
        "transformer/config.json: pooled_projection_dim is 768, but text_encoder makes embeddings of 1280; ",
    ),
    "CLIP without a limit": (
        put_json("tokenizer/tokenizer_config.json", {}),
        "tokenizer_config.json: model_max_length is null; set it to 77, max_position_embeddings of the text_encoder",
    ),
    "CLIP with too high a limit": (
        put_json("tokenizer/tokenizer_config.json", {"model_max_length": 512}),
        "tokenizer_config.json: model_max_length is 512; set it to 77",
    ),
    "VAE without shift": (
        put_json("vae/config.json", VAE | {"shift_factor": None}),
        "vae/config.json: shift_factor is null; it must be a JSON number",
    ),
    "transformer layers missing": (
        put_json("transformer/config.json", TRANSFORMER | {"num_layers": 4}),
        "transformer/config.json: num_layers is 4, but the weights lack transformer_blocks.3; download",
    ),
    "transformer layers left over": (
        put_json("transformer/config.json", TRANSFORMER | {"num_single_layers": 1}),
        "num_single_layers is 1, but the weights have single_transformer_blocks.1; download",
    ),
    "T5 layers missing": (
        put_json("text_encoder_2/config.json", T5 | {"num_layers": 24}),
        "text_encoder_2/config.json: num_layers is 24, but the weights lack encoder.block.2; download",
    ),
    "saved by PEFT": (
        lambda path: write_tensors(
            path / "text_encoder_2/model.safetensors",
            [f"base_model.model.{name}" for name in TENSORS["text_encoder_2/model.safetensors"]],
        ),
        "num_layers is 2, but the weights lack encoder.block.0; the first tensor there is 'base_model.model.encoder.",
    ),
    "impossible size": (
        put_json("tetriserve.json", {"sizes": ["512x512", "100x512"]}),
        "sizes ['100x512'] are not possible; list at least one, each side a multiple of 16",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_line_that_says_how_to_mend_it(checkpoint: Path, fault: str) -> None:
    spoil, expected = FAULTS[fault]
    spoil(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        read_card(checkpoint)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert str(checkpoint) in message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=8), values, max_size=4),
    max_leaves=8,
)
FILES = {
    "model_index.json": MODEL_INDEX,
    "transformer/config.json": TRANSFORMER,
    "vae/config.json": VAE,
    "text_encoder/config.json": CLIP,
    "text_encoder_2/config.json": T5,
    "tokenizer/tokenizer_config.json": {"model_max_length": 77},
    "tokenizer/vocab.json": {"a": 0},
    "scheduler/scheduler_config.json": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    "transformer/diffusion_pytorch_model.safetensors.index.json": {"weight_map": {}},
    "tetriserve.json": {"name": "n", "num_steps": 5, "guidance_scale": 1.0, "sizes": ["512x512"], "dtype": "float32"},
}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_files_of_a_model_hold_it_is_read_or_refused_in_one_line(
    checkpoint: Path, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(FILES)))
    content: dict[str, Any] = FILES[name]
    key = data.draw(st.sampled_from(sorted(content)) | st.text(max_size=8))
    spoilt = data.draw(json_values.map(lambda value: {**content, key: value}) | json_values)
    file = checkpoint / name
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(data.draw(st.just(json.dumps(spoilt).encode()) | st.binary(max_size=40)))
    try:
        card = read_card(checkpoint)
    except CheckpointError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
    else:
        assert card.num_heads >= 1
        assert card.num_text_tokens >= 1
        assert card.valid_degrees((1,)) == (1,)
    finally:
        if before is None:
            file.unlink()
        else:
            file.write_bytes(before)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()), st.integers(0, 99))
def test_whatever_a_weights_file_begins_with_it_is_whole_or_refused(checkpoint: Path, header: bytes, size: int) -> None:
    file = checkpoint / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes((size or len(header)).to_bytes(8, "little") + header)
    with contextlib.suppress(CheckpointError):
        read_card(checkpoint)


def test_reading_a_card_imports_neither_torch_nor_diffusers(checkpoint: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tetriserve.models.checkpoint import read_card; "
        "read_card(Path(sys.argv[1])); print({'torch', 'diffusers', 'transformers', 'numpy'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code, checkpoint], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
