"""What the server must know of a checkpoint before, and without, loading it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetriserve.config import MODEL_NAMES, is_model_name
from tetriserve.core.errors import CheckpointError
from tetriserve.core.request import Shape
from tetriserve.models.registry import adapter_target

DTYPES = ("float32", "bfloat16", "float16")
MAX_TEXT_TOKENS = 512
_OVERRIDES: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "num_steps": int,
    "guidance_scale": (int, float),
    "sizes": list,
    "dtype": str,
}
_DEFAULT_SIDES = (256, 512, 1024, 2048)
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LIBRARIES = ("diffusers", "transformers")
_COMPONENT = re.compile(r"[A-Za-z0-9_]+", re.ASCII)
_MAX_VAE_BLOCKS = 8
_MAX_HEADER_BYTES = 100_000_000
"""What the safetensors format allows."""
_JSON_NAMES: dict[object, str] = {str: "string", int: "integer", list: "array", dict: "object"}


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Facts read from a diffusers checkpoint's JSON files.

    name: what clients call the model.
    size_multiple: height and width must divide by it.
    pixels_per_token: pixels that one image token stands for, on each side.
    num_heads, num_text_tokens: every degree must divide both (Ulysses splits heads; FLUX splits text tokens too).
    fingerprint: changes whenever the architecture does; a profile belongs to one fingerprint.
    """

    name: str
    path: Path
    pipeline_class: str
    dtype: str
    size_multiple: int
    pixels_per_token: int
    num_heads: int
    num_text_tokens: int
    default_num_steps: int
    default_guidance_scale: float
    has_guidance: bool
    has_negative_prompt: bool
    sizes: tuple[Shape, ...]
    fingerprint: str

    def num_tokens(self, shape: Shape) -> int:
        """Image tokens of one denoise step."""
        return (shape.height // self.pixels_per_token) * (shape.width // self.pixels_per_token) * shape.frames

    def valid_degrees(self, shape: Shape, degrees: Sequence[int]) -> tuple[int, ...]:
        """Those of `degrees` that divide the heads, the text tokens and the image tokens of `shape`."""
        counts = (self.num_heads, self.num_text_tokens, self.num_tokens(shape))
        return tuple(k for k in degrees if all(count % k == 0 for count in counts))


def read_card(path: Path) -> ModelCard:
    """Read the facts of the diffusers checkpoint in directory `path`, and check that all its files are there.

    A `tetriserve.json` beside `model_index.json` overrides any of {"name": str, "num_steps": int,
    "guidance_scale": number, "sizes": ["WIDTHxHEIGHT", ...], "dtype": "float32" | "bfloat16" | "float16"}.
    Only JSON files and the headers of weights files are read.

    Raises:
        CheckpointError: one line that names the file at fault and how to mend it.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; give a directory that holds a diffusers pipeline")
    if not (path / "model_index.json").is_file():
        raise CheckpointError(
            f"{path} has no model_index.json; give the top directory of a diffusers pipeline, not one of its parts"
        )
    index = _read_json(path / "model_index.json")
    pipeline_class = _get(index, "_class_name", str, path / "model_index.json")
    try:
        adapter_target(pipeline_class)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    for component, entry in index.items():
        if isinstance(entry, list) and entry != [None, None]:
            _check_component(path, component, entry)
    return _read_flux(path, pipeline_class)


def _read_flux(path: Path, pipeline_class: str) -> ModelCard:
    transformer = _read_json(path / "transformer/config.json")
    vae = _read_json(path / "vae/config.json")
    scheduler = _read_json(path / "scheduler/scheduler_config.json")
    scheduler_class = _get(scheduler, "_class_name", str, path / "scheduler/scheduler_config.json")
    if scheduler_class != "FlowMatchEulerDiscreteScheduler" or scheduler.get("stochastic_sampling"):
        raise CheckpointError(
            f"{path / 'scheduler/scheduler_config.json'}: scheduler {scheduler_class} keeps state or draws noise "
            "between steps; use FlowMatchEulerDiscreteScheduler without stochastic_sampling"
        )
    tokenizer_file = path / "tokenizer_2/tokenizer_config.json"
    tokenizer = {"model_max_length": MAX_TEXT_TOKENS} | _read_json(tokenizer_file)
    has_guidance = bool(transformer.get("guidance_embeds", False))
    num_vae_blocks = len(_get(vae, "block_out_channels", list, path / "vae/config.json"))
    if not 1 <= num_vae_blocks <= _MAX_VAE_BLOCKS:
        raise CheckpointError(
            f"{path / 'vae/config.json'}: block_out_channels has {num_vae_blocks} items; "
            f"allowed: 1 to {_MAX_VAE_BLOCKS}"
        )
    pixels_per_token = 2 * 2 ** (num_vae_blocks - 1)
    num_text_tokens = _get_count(tokenizer, "model_max_length", (int, float), tokenizer_file)
    overrides = _read_overrides(path / "tetriserve.json", pixels_per_token)
    sizes = tuple(Shape(side, side) for side in _DEFAULT_SIDES if side % pixels_per_token == 0)
    return ModelCard(
        name=overrides.get("name", path.resolve().name),
        path=path,
        pipeline_class=pipeline_class,
        dtype=overrides.get("dtype", "bfloat16"),
        size_multiple=pixels_per_token,
        pixels_per_token=pixels_per_token,
        num_heads=_get_count(transformer, "num_attention_heads", int, path / "transformer/config.json"),
        num_text_tokens=int(min(MAX_TEXT_TOKENS, num_text_tokens)),
        default_num_steps=overrides.get("num_steps", 28 if has_guidance else 4),
        default_guidance_scale=float(overrides.get("guidance_scale", 3.5)),
        has_guidance=has_guidance,
        has_negative_prompt=True,
        sizes=overrides.get("sizes", sizes),
        fingerprint=_fingerprint(
            transformer, vae, *(_read_json(path / part / "config.json") for part in ("text_encoder", "text_encoder_2"))
        ),
    )


def _read_overrides(file: Path, size_multiple: int) -> dict[str, Any]:
    """The checked contents of `tetriserve.json`, `sizes` as shapes; empty if there is no such file."""
    if not file.exists():
        return {}
    overrides = _read_json(file)
    for key in overrides:
        if key not in _OVERRIDES:
            raise CheckpointError(f"{file}: unknown key {key!r}; allowed: {', '.join(_OVERRIDES)}")
        _get(overrides, key, _OVERRIDES[key], file)
    if not is_model_name(name := overrides.get("name", "unnamed")):
        raise CheckpointError(
            f"{file}: name is {name[:200]!r}; allowed: {MODEL_NAMES}; without it, the directory's name"
        )
    if (num_steps := overrides.get("num_steps", 1)) < 1:
        raise CheckpointError(f"{file}: num_steps is {num_steps}; it must be at least 1")
    if not math.isfinite(guidance_scale := overrides.get("guidance_scale", 0)) or guidance_scale < 0:
        raise CheckpointError(f"{file}: guidance_scale is {guidance_scale}; it must be a number that is not negative")
    if (dtype := overrides.get("dtype", DTYPES[0])) not in DTYPES:
        raise CheckpointError(f"{file}: dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    if "sizes" in overrides:
        try:
            sizes = tuple(Shape.parse(str(size)) for size in overrides["sizes"])
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}") from None
        bad = [str(size) for size in sizes if size.height % size_multiple or size.width % size_multiple]
        if bad or not sizes:
            raise CheckpointError(
                f"{file}: sizes {bad} are not possible; list at least one, each side a multiple of {size_multiple}"
            )
        overrides["sizes"] = sizes
    return overrides


def _check_component(path: Path, component: str, entry: list[object]) -> None:
    """That the component named by `model_index.json` is there, complete and not truncated, and brings no code along."""
    match entry:
        case [str(library), str(class_name)] if library in _LIBRARIES and _COMPONENT.fullmatch(component):
            folder = path / component
        case _:
            raise CheckpointError(
                f"{path / 'model_index.json'}: {_quoted(component)} is {_quoted(entry)}; allowed: classes of "
                f"{' and '.join(_LIBRARIES)}; code that models bring is never run"
            )
    for file in sorted(folder.glob("*.json")):
        if file.name.endswith("config.json") and "auto_map" in _read_json(file):
            raise CheckpointError(f"{file} names code in auto_map; code that models bring is never run: remove it")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing though model_index.json names it; download the checkpoint again")
    if any(kind in class_name for kind in ("Tokenizer", "Scheduler", "Processor", "FeatureExtractor")):
        return
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; download the checkpoint again")
    stem = "model" if library == "transformers" else "diffusion_pytorch_model"
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        names = sorted({str(name) for name in _get(_read_json(index), "weight_map", dict, index).values()})
        if bad := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise CheckpointError(f"{index}: {bad[0]!r} is no name of a safetensors file in this directory")
    else:
        names = [f"{stem}.safetensors"]
    for name in names:
        if (folder / name).is_file():
            _check_weights(folder / name)
        elif index.is_file():
            raise CheckpointError(f"{folder / name} is missing though {index.name} names it; download it again")
        elif pickled := [file for pattern in _PICKLED for file in folder.glob(pattern)]:
            raise CheckpointError(
                f"{folder} has its weights as {pickled[0].suffix} only; safetensors are needed: save the pipeline "
                "again with save_pretrained(..., safe_serialization=True)"
            )
        else:
            raise CheckpointError(f"{folder} has no weights ({name}); download the checkpoint again")


def _check_weights(file: Path) -> None:
    """That the file is as long as its own header says: catches broken downloads and Git LFS pointers."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(header_size)) if header_size <= min(size - 8, _MAX_HEADER_BYTES) else None
            ends = [entry["data_offsets"][1] for key, entry in (header or {}).items() if key != "__metadata__"]
            is_whole = header is not None and size == 8 + header_size + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            is_whole = False
    if not is_whole:
        raise CheckpointError(f"{file} is truncated or not a safetensors file ({size} bytes); download it again")


def _fingerprint(*configs: Mapping[str, Any]) -> str:
    """Twelve hex digits over the configs, less what says nothing of the architecture (versions, paths, dtypes)."""
    ignored = ("transformers_version", "torch_dtype", "dtype")
    facts = [
        {key: value for key, value in config.items() if not key.startswith("_") and key not in ignored}
        for config in configs
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():  # to read a pipe would be to wait for it
        raise CheckpointError(f"cannot read {file} (there is no such file); download the checkpoint again")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {file} ({error.strerror}); download the checkpoint again") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); mend it or download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object; download it again")
    return content


def _quoted(value: object) -> str:
    """JSON, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _get_count(content: Mapping[str, Any], key: str, kind: type | tuple[type, ...], file: Path) -> Any:
    value = _get(content, key, kind, file)
    if not value >= 1:
        raise CheckpointError(f"{file}: {key} is {value}; it must be at least 1")
    return value


def _get(content: Mapping[str, Any], key: str, kind: type | tuple[type, ...], file: Path) -> Any:
    """`content[key]`, which must be of type `kind` (a bool is no number)."""
    value = content.get(key)
    if isinstance(value, bool) or not isinstance(value, kind):
        name = _JSON_NAMES.get(kind, "number")
        raise CheckpointError(f"{file}: {key} is {_quoted(value)}; it must be a JSON {name}")
    return value
