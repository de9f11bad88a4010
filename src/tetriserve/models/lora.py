"""LoRA adapters, judged from their files' headers alone: no torch, nothing loaded.

What diffusers' loaders would leave out, pad with zeros, or change of the model itself, ends a start in one line. Files
in the layout of diffusers are compared with the model's own files here; those of other trainers are converted by
diffusers as they are loaded, and compared then (`models.adapters`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from tetriserve.config import MODEL_NAMES, LoraConfig, is_model_name
from tetriserve.core.errors import CheckpointError, ConfigError
from tetriserve.core.execution import DEFAULT
from tetriserve.models.card import LoraFile, ModelCard
from tetriserve.models.files import find_weights, quoted, read_header, read_json, read_metadata
from tetriserve.models.registry import family_of

_TENSOR = re.compile(r"([a-z0-9_]+)\.(.+)\.lora_([AB])\.(weight|bias)")
_SCALING = re.compile(r".+\.alpha")
_DORA = ("dora_scale", "lora_magnitude_vector")
_METADATA = "lora_adapter_metadata"
_FREE_FACTS = frozenset(
    (
        "alpha_pattern", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
        "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "megatron_core", "peft_version",
        "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_rslora",
    )
)  # fmt: skip
"""Of peft's configuration, which the metadata may hold: these do no more than place and scale the adapter."""
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian")
"""Others take the adapter's start out of the model's own weights."""
_Shapes = Mapping[str, tuple[int, ...]]


def with_loras(card: ModelCard, loras: Sequence[LoraConfig]) -> ModelCard:
    """`card` with these adapters, in their order.

    Raises:
        CheckpointError: a file is missing, broken, or made for another model; one line names it.
        ConfigError: a name cannot be served, or the model's execution does not go with adapters.
    """
    if not loras:
        return card
    if not family_of(card).lora_components:
        raise ConfigError(f"lora is set, but {card.pipeline_class} is served without LoRAs; leave it out")
    if card.has_boundary:
        raise ConfigError(
            f"lora is set, but {card.name} has two transformers and is served without LoRAs; leave it out"
        )
    for name in ("compile", "quantization"):
        if (value := getattr(card.execution, name)) != DEFAULT:
            raise ConfigError(f"lora is set with {name} {value!r}, which is not served together; leave one of them out")
    found: list[LoraFile] = []
    for lora in loras:
        if not is_model_name(lora.name):
            raise ConfigError(f"lora is called {lora.name[:200]!r}; allowed: {MODEL_NAMES}")
        if card.is_called(lora.name) or any(other.name == lora.name for other in found):
            raise ConfigError(f"lora is called {lora.name!r}, as the model or another LoRA is; give it another name")
        file = _find_file(Path(lora.path))
        _check(card, file)
        found.append(LoraFile(name=lora.name, file=file, digest=digest_of(file)))
    return replace(card, loras=tuple(found))


def digest_of(file: Path) -> str:
    """Of a file's content: 32 hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _find_file(path: Path) -> Path:
    """The safetensors file that `path` is, or holds."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            what = f"{len(files)} safetensors files" if files else "no safetensors file"
            raise CheckpointError(f"{path} holds {what}; give the file of one LoRA")
        return files[0]
    if not path.is_file():
        raise CheckpointError(f"{path} is not there; give the safetensors file of a LoRA, or a directory with one")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is no .safetensors file; other formats, which may run code, are not read")
    return path


def _check(card: ModelCard, file: Path) -> None:
    """That the adapter is whole, is one, and fits the model, as far as its header says."""
    shapes = _shapes(file)
    if not shapes:
        raise CheckpointError(f"{file} holds no tensors; it is no LoRA")
    if dora := next((key for key in shapes if any(mark in key for mark in _DORA)), None):
        raise CheckpointError(f"{file}: {_cut(dora)} makes it a DoRA, which is not served")
    _check_metadata(file)
    components = _components(card)
    if not any(_TENSOR.fullmatch(key) for key in shapes if key.split(".")[0] in components):
        if not any("lora" in key.lower() for key in shapes):
            raise CheckpointError(f"{file}: no tensor is called lora, the first is {_cut(min(shapes))}; it is no LoRA")
        return  # another trainer's layout
    allowed = [name for name in family_of(card).lora_components if name in components]
    for key in sorted(shapes):
        _check_tensor(card, file, key, shapes, allowed)


def _check_tensor(card: ModelCard, file: Path, key: str, shapes: _Shapes, allowed: Sequence[str]) -> None:
    """`allowed`: components that an adapter may change."""
    match = _TENSOR.fullmatch(key)
    if match is None:
        if _SCALING.fullmatch(key) and len(shapes[key]) <= 1:
            return
        raise CheckpointError(f"{file}: {_cut(key)} is no part of a LoRA")
    component, module, side, kind = match.groups()
    if component not in allowed:
        raise CheckpointError(
            f"{file}: {_cut(key)} is for {component[:100]}; a LoRA of {card.pipeline_class} is for {', '.join(allowed)}"
        )
    base = _module_shapes(card.path / component).get(_flat(module))
    if base is None:
        raise CheckpointError(
            f"{file}: {_cut(key)} is for a layer that {card.path / component} does not have; it was made for another "
            "model"
        )
    if kind == "bias":
        wanted, given = base[:1], shapes[key]
    else:
        stem = f"{component}.{module}.lora_"
        down, up = shapes.get(f"{stem}A.weight"), shapes.get(f"{stem}B.weight")
        if down is None or up is None:
            missing = f"{stem}{'A' if down is None else 'B'}.weight"
            raise CheckpointError(f"{file} lacks {_cut(missing)}, the other half of {_cut(key)}")
        if up[1:2] != down[:1]:
            raise CheckpointError(
                f"{file}: {_cut(f'{stem}A.weight')} is {_sized(down)}, but the lora_B beside it {_sized(up)}; "
                "ranks differ"
            )
        wanted, given = (base[1:], down[1:]) if side == "A" else (base[:1], up[:1])
    if wanted != given:
        raise CheckpointError(
            f"{file}: {_cut(key)} is {_sized(shapes[key])}, but that layer of {card.path / component} is "
            f"{_sized(base)}; it was made for another model"
        )


def _check_metadata(file: Path) -> None:
    """That peft's configuration, if the file has one, asks for a LoRA and no more."""
    text = read_metadata(file).get(_METADATA)
    if text is None:
        return
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise CheckpointError(f"{file}: its {_METADATA} is no JSON object; save the LoRA again")
    for key, value in facts.items():
        name = key.split(".")[-1]
        is_plain = value in (False, None, "none") or value == {} or value == []
        if name == "init_lora_weights":
            is_plain = value in _PLAIN_INITIALISATIONS
        elif name == "peft_type":
            is_plain = value == "LORA"
        elif name in _FREE_FACTS:
            is_plain = True
        if not is_plain:
            raise CheckpointError(f"{file}: its metadata says {name[:100]} {quoted(value)}, which is not served")


def _components(card: ModelCard) -> set[str]:
    """Models of the checkpoint."""
    index = read_json(card.path / "model_index.json")
    return {name for name, entry in index.items() if isinstance(entry, list) and entry != [None, None]}


@cache
def _module_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a model's layers, by layer."""
    library = read_json(folder.parent / "model_index.json")[folder.name][0]
    shapes: dict[str, tuple[int, ...]] = {}
    for file in find_weights(folder, library).files:
        shapes |= {_flat(key.removesuffix(".weight")): shape for key, shape in _shapes(file).items() if "weight" in key}
    return {module: shape for module, shape in shapes.items() if len(shape) > 1}


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    header = read_header(file)
    try:
        return {key: tuple(map(int, entry["shape"])) for key, entry in header.items()}
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: its header does not say the shape of each tensor; download it again") from None


def _flat(module: str) -> str:
    """Older versions of transformers put CLIP's layers into a `text_model`."""
    return module.removeprefix("text_model.")


def _cut(key: str) -> str:
    return repr(key if len(key) <= 100 else f"{key[:100]}...")


def _sized(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"
