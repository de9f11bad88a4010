"""The files of a diffusers checkpoint, judged from its directory alone: no torch, nothing loaded.

Each fault that a directory shows ends a start at once, in one line that names the file and the remedy.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tetriserve.core.bounds import shown
from tetriserve.core.errors import CheckpointError
from tetriserve.files import read_bounded

_LIBRARIES = ("diffusers", "transformers")
_COMPONENT = re.compile(r"[A-Za-z0-9_]+", re.ASCII)
_FOLDER = re.compile(r"[a-z0-9_]+", re.ASCII)
_WITHOUT_WEIGHTS = ("Tokenizer", "Scheduler", "Processor", "FeatureExtractor", "Guidance")
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf")
_QUANTISED = ("I8", "U8", "I4", "U4")
_MAX_HEADER_BYTES = 100_000_000
"""What the safetensors format allows."""
_MAX_JSON_BYTES = 2**28
_MAX_COUNT = 2**31
_TOKENIZER_FILES = {
    "ByT5Tokenizer": ((),),  # its words are bytes
    "CLIPTokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "Qwen2Tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "Qwen2VLProcessor": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "T5Tokenizer": (("tokenizer.json",), ("spiece.model",)),
}
"""By class, less the suffix `Fast`: sets of files each of which is a whole vocabulary."""
_ANY_VOCABULARY = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("tokenizer.model",),
    ("vocab.txt",),
)
"""Of other classes. A vocabulary that the class cannot read leaves it without words, which shows when it is tried."""
_JSON_NAMES: dict[object, str] = {str: "string", int: "integer", list: "array", dict: "object"}


@dataclass(frozen=True)
class Weights:
    """The safetensors files of one component. `variant`: the name that stands in theirs, such as fp16."""

    files: tuple[Path, ...]
    variant: str | None = None

    def tensor_names(self) -> Iterator[str]:
        for file in self.files:
            yield from read_header(file)


@dataclass(frozen=True)
class LayerNames:
    """Where the layers of a component are: the key and default of their number, and how their tensors' names begin."""

    component: str
    key: str
    default: int
    prefix: str


def find_root(path: Path) -> Path:
    """The directory that holds `model_index.json`: `path`, or for a hub folder `models--...` its snapshot.

    Raises:
        CheckpointError: there is none, or several.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; give a directory that holds a diffusers pipeline")
    if (path / "model_index.json").is_file():
        return path
    snapshots = sorted(path.glob("snapshots/*/model_index.json"))
    if len(snapshots) == 1:
        return snapshots[0].parent
    if snapshots:
        raise CheckpointError(f"{path} holds {len(snapshots)} snapshots; give one, such as {snapshots[0].parent}")
    raise CheckpointError(
        f"{path} has no model_index.json; give the top directory of a diffusers pipeline, not one of its parts"
    )


def hub_name(root: Path) -> str:
    """What the checkpoint is called: the hub's name of a snapshot, else the directory's."""
    real = root.resolve()
    repository = real.parent.parent.name
    if real.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return real.name


def module_of(library: str) -> str | None:
    """The module that has the classes of `library`, as `model_index.json` names it; None if it is not allowed.

    Allowed are diffusers, transformers, and folders of diffusers' pipelines, which define some components themselves.
    """
    if library in _LIBRARIES:
        return library
    spec = find_spec("diffusers")
    if spec is None or spec.origin is None or not _FOLDER.fullmatch(library):
        return None
    is_there = (Path(spec.origin).parent / "pipelines" / library / "__init__.py").is_file()
    return f"diffusers.pipelines.{library}" if is_there else None


def check_component(path: Path, component: str, entry: object) -> None:
    """That the component named by `model_index.json` is there, complete and not truncated, and brings no code along."""
    match entry:
        case [str(library), str(class_name)] if module_of(library) and _COMPONENT.fullmatch(component):
            folder = path / component
        case _:
            raise CheckpointError(
                f"{path / 'model_index.json'}: {quoted(component)} is {quoted(entry)}; allowed: classes of "
                f"{' and '.join(_LIBRARIES)}; code that models bring is never run"
            )
    for file in sorted(folder.glob("*.json")):
        if file.name.endswith("config.json"):
            _check_config(file)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing though model_index.json names it; download the checkpoint again")
    if "Tokenizer" in class_name or class_name in _TOKENIZER_FILES or component.startswith("tokenizer"):
        _check_tokenizer(folder, class_name)
    elif not any(kind in class_name for kind in _WITHOUT_WEIGHTS):
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json; download the checkpoint again")
        for weights_file in find_weights(folder, library).files:
            _check_weights(weights_file)


def find_weights(folder: Path, library: str) -> Weights:
    """The weights that are loaded of a component: those without a variant, else the only variant.

    Raises:
        CheckpointError: there are none, or not all of them; the line says what is there instead.
    """
    stem = "model" if library == "transformers" else "diffusion_pytorch_model"
    for variant in (None, *_variants(folder, stem)):
        infix = "" if variant is None else f".{variant}"
        if (index := folder / f"{stem}.safetensors.index{infix}.json").is_file():
            return Weights(_shards(index), variant)
        if (single := folder / f"{stem}{infix}.safetensors").is_file():
            return Weights((single,), variant)
    raise CheckpointError(_why_no_weights(folder, stem))


def check_layers(path: Path, index: Mapping[str, Any], layers: Sequence[LayerNames]) -> None:
    """That each layer has tensors, and each tensor of a layer its place. Loading compares all tensors."""
    for each in layers:
        file, key, prefix = path / each.component / "config.json", each.key, each.prefix
        config = read_json(file)
        own = config.get("text_config")  # of an encoder that reads texts and pictures, the part for texts
        num_layers = get({key: each.default} | config | (own if isinstance(own, dict) else {}), key, int, file)
        pattern = re.compile(rf"(?:(?:text_model|language_model|model)\.)*{re.escape(prefix)}\.(\d{{1,6}})\.")
        names = sorted(find_weights(path / each.component, index[each.component][0]).tensor_names())
        found = {int(match[1]) for name in names if (match := pattern.match(name))}
        missing = next((layer for layer in range(num_layers) if layer not in found), None)
        if missing is None and len(found) <= num_layers:
            continue
        problem = f"have {prefix}.{max(found)}" if missing is None else f"lack {prefix}.{missing}"
        first = f"; the first tensor there is {names[0][:100]!r}" if names and not found else ""
        raise CheckpointError(
            f"{file}: {key} is {num_layers}, but the weights {problem}{first}; download the checkpoint again"
        )


def fingerprint(*configs: Mapping[str, Any]) -> str:
    """Twelve hex digits over the configs, less what says nothing of the architecture (versions, paths, dtypes)."""
    ignored = ("transformers_version", "torch_dtype", "dtype")
    facts = [
        {key: value for key, value in config.items() if not key.startswith("_") and key not in ignored}
        for config in configs
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]


def read_header(file: Path) -> dict[str, Mapping[str, Any]]:
    """Dtype and shape of each tensor in a safetensors file.

    Raises:
        CheckpointError: the file is not as long as its own header says: a broken download, or a Git LFS pointer.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(header_size)) if header_size <= min(size - 8, _MAX_HEADER_BYTES) else None
            tensors = {key: entry for key, entry in (header or {}).items() if key != "__metadata__"}
            ends = [entry["data_offsets"][1] for entry in tensors.values()]
            is_whole = header is not None and size == 8 + header_size + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            is_whole = False
    if not is_whole:
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({size} bytes); download it again")
    return tensors


def read_metadata(file: Path) -> dict[str, str]:
    """The texts that a safetensors file, which `read_header` found whole, carries beside its tensors."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    found = header.get("__metadata__")
    return {key: text for key, text in found.items() if isinstance(text, str)} if isinstance(found, dict) else {}


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bounded(file, _MAX_JSON_BYTES).decode())
    except OSError as error:
        raise CheckpointError(f"cannot read {file} ({error.strerror}); download the checkpoint again") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); mend it or download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object; download it again")
    return content


def get_count(content: Mapping[str, Any], key: str, kind: type | tuple[type, ...], file: Path) -> Any:
    value = get(content, key, kind, file)
    if not 1 <= value <= _MAX_COUNT:
        raise CheckpointError(f"{file}: {key} is {shown(value)}; it must be from 1 to {_MAX_COUNT}")
    return value


def get(content: Mapping[str, Any], key: str, kind: type | tuple[type, ...], file: Path) -> Any:
    """`content[key]`, which must be of type `kind` (a bool is no number)."""
    value = content.get(key)
    if isinstance(value, bool) or not isinstance(value, kind):
        name = _JSON_NAMES.get(kind, "number")
        raise CheckpointError(f"{file}: {key} is {quoted(value)}; it must be a JSON {name}")
    return value


def quoted(value: object) -> str:
    """JSON, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _check_config(file: Path) -> None:
    config = read_json(file)
    if "auto_map" in config:
        raise CheckpointError(f"{file} names code in auto_map; code that models bring is never run: remove it")
    if quantisation := config.get("quantization_config"):
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise CheckpointError(
            f"{file} has a quantization_config ({quoted(method)}); quantised weights are not served: use the "
            "checkpoint in bfloat16"
        )


def _check_tokenizer(folder: Path, class_name: str) -> None:
    """That the vocabulary is there: without it, transformers makes a tokenizer to which all texts are alike."""
    allowed = _TOKENIZER_FILES.get(class_name.removesuffix("Fast"), _ANY_VOCABULARY)
    if not any(all((folder / name).is_file() for name in names) for names in allowed):
        ways = ", or ".join(" and ".join(names) for names in allowed)
        raise CheckpointError(f"{folder} has no vocabulary ({ways}); download the checkpoint again")
    for name in ("tokenizer.json", "vocab.json"):
        if (folder / name).is_file():
            read_json(folder / name)


def _variants(folder: Path, stem: str) -> list[str]:
    """Names of the variants in `folder`, at most one.

    Raises:
        CheckpointError: there are several, and none without a name that would be taken before them.
    """
    if (folder / f"{stem}.safetensors").is_file() or (folder / f"{stem}.safetensors.index.json").is_file():
        return []
    pattern = re.compile(rf"{stem}(?:\.safetensors\.index)?\.(\w+)\.(?:safetensors|json)")
    names = [match[1] for file in folder.iterdir() if (match := pattern.fullmatch(file.name))]
    variants = sorted({name for name in names if name not in ("index", "safetensors")})
    if len(variants) > 1:
        raise CheckpointError(f"{folder} has weights in the variants {', '.join(variants)}; leave one of them")
    return variants


def _shards(index: Path) -> tuple[Path, ...]:
    names = sorted({str(name) for name in get(read_json(index), "weight_map", dict, index).values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name!r} is no name of a safetensors file in this directory")
        if not (index.parent / name).is_file():
            raise CheckpointError(
                f"{index.parent / name} is missing though {index.name} names it; {_remedy(index.parent)}"
            )
    return tuple(index.parent / name for name in names)


def _why_no_weights(folder: Path, stem: str) -> str:
    if shards := sorted(folder.glob(f"{stem}*-of-*.safetensors")):
        return f"{folder} has {shards[0].name} but no {stem}.safetensors.index.json; download that file"
    if others := [file for pattern in _OTHER_FORMATS for file in folder.glob(pattern)]:
        remedy = (
            "use the checkpoint in bfloat16"
            if others[0].suffix == ".gguf"
            else "save the pipeline again with save_pretrained(..., safe_serialization=True)"
        )
        return f"{folder} has its weights as {others[0].suffix} only; safetensors are needed: {remedy}"
    return f"{folder} has no weights ({stem}.safetensors); {_remedy(folder)}"


def _remedy(folder: Path) -> str:
    """What to do about a missing file. Downloads leave `.incomplete` files here, or where the hub's client has them."""
    root = folder.parent
    places = (folder, root / ".cache/huggingface/download" / folder.name, root.resolve().parent.parent / "blobs")
    unfinished = [file for place in places for file in sorted(place.glob("*.incomplete"))]
    if unfinished:
        return f"its download is not finished ({unfinished[0]}): run it again"
    return "download the checkpoint again"


def _check_weights(file: Path) -> None:
    for name, tensor in read_header(file).items():
        if tensor.get("dtype") in _QUANTISED:
            raise CheckpointError(
                f"{file}: {name[:100]!r} is {tensor['dtype']}; quantised weights are not served: use the checkpoint "
                "in bfloat16"
            )
