"""`read_card` on checkpoints made of JSON and empty weights: the facts, and one clear line for each thing wrong."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tetriserve.core.errors import CheckpointError
from tetriserve.core.request import Shape
from tetriserve.models.card import ModelCard, read_card
from tetriserve.models.registry import ADAPTERS, adapter_target

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
TRANSFORMER = {"_diffusers_version": "0.42.1", "num_attention_heads": 24, "num_layers": 19, "guidance_embeds": True}


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_weights(file: Path, header: bytes = b"{}", data: bytes = b"") -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A complete FLUX.1-dev look-alike, its transformer sharded."""
    path = tmp_path / "flux-dev"
    write_json(path / "model_index.json", MODEL_INDEX)
    write_json(path / "scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    write_json(path / "tokenizer/tokenizer_config.json", {"model_max_length": 77})
    write_json(path / "tokenizer_2/tokenizer_config.json", {"model_max_length": 512})
    write_json(path / "transformer/config.json", TRANSFORMER)
    write_json(path / "vae/config.json", {"block_out_channels": [128, 256, 512, 512]})
    for part in ("text_encoder", "text_encoder_2"):
        write_json(path / part / "config.json", {"hidden_size": 768, "dtype": "bfloat16"})
        write_weights(path / part / "model.safetensors")
    write_weights(path / "vae/diffusion_pytorch_model.safetensors")
    shards = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for shard in shards:
        write_weights(path / "transformer" / shard)
    write_json(
        path / "transformer/diffusion_pytorch_model.safetensors.index.json",
        {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[1]}},
    )
    return path


def test_a_guidance_distilled_flux_reads_as_flux_dev(checkpoint: Path) -> None:
    card = read_card(checkpoint)
    assert card == ModelCard(
        name="flux-dev",
        path=checkpoint,
        pipeline_class="FluxPipeline",
        dtype="bfloat16",
        size_multiple=16,
        pixels_per_token=16,
        num_heads=24,
        num_text_tokens=512,
        default_num_steps=28,
        default_guidance_scale=3.5,
        has_guidance=True,
        has_negative_prompt=True,
        sizes=(Shape(256, 256), Shape(512, 512), Shape(1024, 1024), Shape(2048, 2048)),
        fingerprint=card.fingerprint,
    )
    assert len(card.fingerprint) == 12
    assert card.num_tokens(Shape(1024, 512)) == 64 * 32
    assert card.valid_degrees(Shape(256, 256), (1, 2, 3, 4, 8, 16)) == (1, 2, 4, 8)


def test_a_flux_without_guidance_embeds_reads_as_flux_schnell(checkpoint: Path) -> None:
    write_json(checkpoint / "transformer/config.json", TRANSFORMER | {"guidance_embeds": False})
    card = read_card(checkpoint)
    assert (card.default_num_steps, card.has_guidance) == (4, False)


def test_text_tokens_are_what_the_tokenizer_holds_but_at_most_512(checkpoint: Path) -> None:
    for model_max_length, expected in ((64, 64), (512, 512), (1e30, 512)):
        write_json(checkpoint / "tokenizer_2/tokenizer_config.json", {"model_max_length": model_max_length})
        assert read_card(checkpoint).num_text_tokens == expected


def test_tetriserve_json_overrides_the_defaults(checkpoint: Path) -> None:
    overrides = {"name": "dev", "num_steps": 20, "guidance_scale": 2, "sizes": ["512x256"], "dtype": "float32"}
    write_json(checkpoint / "tetriserve.json", overrides)
    card = read_card(checkpoint)
    assert (card.name, card.default_num_steps, card.default_guidance_scale, card.dtype) == ("dev", 20, 2.0, "float32")
    assert card.sizes == (Shape(height=256, width=512),)


def test_the_fingerprint_follows_the_architecture_and_nothing_else(checkpoint: Path) -> None:
    before = read_card(checkpoint).fingerprint
    write_json(checkpoint / "transformer/config.json", TRANSFORMER | {"_diffusers_version": "1.0"})
    write_json(checkpoint / "text_encoder/config.json", {"dtype": "float32", "hidden_size": 768})
    write_json(checkpoint / "tetriserve.json", {"name": "other", "num_steps": 5})
    assert read_card(checkpoint).fingerprint == before
    write_json(checkpoint / "transformer/config.json", TRANSFORMER | {"num_layers": 20})
    assert read_card(checkpoint).fingerprint != before


def put(name: str, text: str) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_text(text)


def put_json(name: str, content: Any) -> Callable[[Path], Any]:
    return lambda path: write_json(path / name, content)


def remove(name: str) -> Callable[[Path], Any]:
    return lambda path: shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()


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


def a_pipe(path: Path) -> None:
    (path / "vae/config.json").unlink()
    os.mkfifo(path / "vae/config.json")


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (remove(""), "flux-dev is not a directory; give a directory that holds a diffusers pipeline"),
    "no index": (remove("model_index.json"), "has no model_index.json; give the top directory of a diffusers pipeline"),
    "unsupported class": (
        put_json("model_index.json", MODEL_INDEX | {"_class_name": "StableDiffusionPipeline"}),
        "no adapter serves pipeline class 'StableDiffusionPipeline'; supported: FluxPipeline",
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
        "tetriserve.json: unknown key 'steps'; allowed: name, num_steps, guidance_scale, sizes, dtype",
    ),
    "wrong type": (put_json("tetriserve.json", {"num_steps": True}), "num_steps is true; it must be a JSON integer"),
    "no steps": (put_json("tetriserve.json", {"num_steps": 0}), "num_steps is 0; it must be at least 1"),
    "NaN guidance": (put("tetriserve.json", '{"guidance_scale": NaN}'), "guidance_scale is nan; it must be a number"),
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
    "no VAE": (put_json("vae/config.json", {"block_out_channels": []}), "has 0 items; allowed: 1 to 8"),
    "a deep VAE": (put_json("vae/config.json", {"block_out_channels": [1] * 60}), "block_out_channels has 60 items"),
    "no heads": (put_json("transformer/config.json", {"num_attention_heads": 0}), "num_attention_heads is 0; it"),
    "no text": (put("tokenizer_2/tokenizer_config.json", '{"model_max_length": NaN}'), "model_max_length is nan; it"),
    "a name of two lines": (put_json("tetriserve.json", {"name": "a\nb"}), "name is 'a\\nb'; allowed: 1 to 200"),
    "a long name": (put_json("tetriserve.json", {"name": "a" * 201}), "; allowed: 1 to 200 printable characters"),
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
    "vae/config.json": {"block_out_channels": [128, 256, 512, 512]},
    "tokenizer_2/tokenizer_config.json": {"model_max_length": 512},
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
        assert card.valid_degrees(card.sizes[0], (1,)) == (1,)
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
        "import sys; from pathlib import Path; from tetriserve.models.card import read_card; "
        "read_card(Path(sys.argv[1])); print({'torch', 'diffusers', 'transformers', 'numpy'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code, checkpoint], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_every_registered_adapter_names_an_existing_module() -> None:
    source = Path(sys.modules[read_card.__module__].__file__ or "").parent
    for pipeline_class in ADAPTERS:
        module, _, name = adapter_target(pipeline_class).partition(":")
        assert f"class {name}" in (source / f"{module.rpartition('.')[2]}.py").read_text()
