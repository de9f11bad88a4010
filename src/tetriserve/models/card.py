"""What the server must know of a checkpoint before, and without, loading it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetriserve.config import MODEL_NAMES, is_model_name
from tetriserve.core.bounds import MAX_STEPS, shown
from tetriserve.core.errors import CheckpointError
from tetriserve.core.request import Shape, Stage
from tetriserve.core.stages import image_stages
from tetriserve.models.files import (
    check_component,
    find_root,
    find_weights,
    get,
    get_count,
    hub_name,
    quoted,
    read_json,
)
from tetriserve.models.registry import adapter_target

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Tolerance:
    """By how much of 255 levels an image may differ from the same request's at degree 1: any subpixel, and the mean.

    Tested with the bundled model under switching schedules (`tests/gloo/test_tolerance.py`). Another model may exceed
    it in half precision, where it is a measurement and no proof.
    """

    max_levels: int
    mean_levels: float


TOLERANCES = {
    "float32": Tolerance(1, 0.01),
    "bfloat16": Tolerance(32, 2.5),
    "float16": Tolerance(10, 0.5),
}
MAX_TEXT_TOKENS = 512
"""What `FluxPipeline` allows, and its default."""
_OVERRIDES: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "num_steps": int,
    "guidance_scale": (int, float),
    "sizes": list,
    "dtype": str,
    "max_sequence_length": int,
}
_SIDES = (256, 512, 1024, 2048)
_DEFAULT_SAMPLE_SIZE = 128
"""Side in latents of the picture that `FluxPipeline` draws where no size is asked for."""
_MAX_VAE_BLOCKS = 8
_COMPONENTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")
_LAYERS = (
    ("transformer", "num_layers", 19, "transformer_blocks"),
    ("transformer", "num_single_layers", 38, "single_transformer_blocks"),
    ("text_encoder", "num_hidden_layers", 12, "encoder.layers"),
    ("text_encoder_2", "num_layers", 6, "encoder.block"),
)
"""Component, key and default of its number of layers, and what their tensors' names begin with."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Facts read from a diffusers checkpoint's JSON files.

    name, aliases: what clients call the model; see `is_called`.
    path: the directory that holds `model_index.json`.
    size_multiple: height and width must divide by it.
    pixels_per_token: pixels that one image token stands for, on each side.
    num_heads, num_text_tokens: every degree must divide both (Ulysses splits heads; FLUX splits text tokens too).
        Texts are padded to `num_text_tokens`, the pipeline's `max_sequence_length`, and cut at it.
    sizes: the default first.
    fingerprint: changes whenever the architecture does; a profile belongs to one fingerprint.
    stamp: changes whenever a file of the checkpoint does.
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
    aliases: tuple[str, ...] = ()
    stamp: str = ""

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[self.dtype]

    def is_called(self, name: str) -> bool:
        """Whether clients may write `name`: a served name, the directory's path, or `default`."""
        return name in (self.name, *self.aliases, "default", str(self.path), str(self.path.resolve()))

    def stages(self, num_steps: int, negative_prompt: str | None, true_cfg_scale: float) -> tuple[Stage, ...]:
        """What a request goes through. Guidance by a negative prompt takes a second pass at each step."""
        return image_stages(num_steps, 2 if negative_prompt is not None and true_cfg_scale > 1 else 1)

    def num_tokens(self, shape: Shape) -> int:
        """Image tokens of one denoise step."""
        return (shape.height // self.pixels_per_token) * (shape.width // self.pixels_per_token) * shape.frames

    def valid_degrees(self, shape: Shape, degrees: Sequence[int]) -> tuple[int, ...]:
        """Those of `degrees` that divide the heads, the text tokens and the image tokens of `shape`."""
        counts = (self.num_heads, self.num_text_tokens, self.num_tokens(shape))
        return tuple(k for k in degrees if all(count % k == 0 for count in counts))


def read_card(path: Path) -> ModelCard:
    """Read the facts of the diffusers checkpoint in directory `path`, and check that all its files are there.

    `path` may be a hub folder `models--...` with one snapshot. A `tetriserve.json` beside `model_index.json` overrides
    any of {"name": str, "num_steps": int, "guidance_scale": number, "sizes": ["WIDTHxHEIGHT", ...], "dtype":
    "float32" | "bfloat16" | "float16", "max_sequence_length": int}; the first of the sizes is the default.
    Only JSON files and the headers of weights files are read.

    Raises:
        CheckpointError: one line that names the file at fault and how to mend it.
    """
    root = find_root(path)
    index = read_json(root / "model_index.json")
    pipeline_class = get(index, "_class_name", str, root / "model_index.json")
    try:
        adapter_target(pipeline_class)
    except CheckpointError as error:
        raise CheckpointError(f"{root}: {error}") from None
    for component in _COMPONENTS:
        if index.get(component) in (None, [None, None]):
            raise CheckpointError(
                f"{root / 'model_index.json'}: {component} is {quoted(index.get(component))}; {pipeline_class} needs "
                "it: download the whole checkpoint"
            )
    for component, entry in index.items():
        if component in _COMPONENTS or (isinstance(entry, list) and entry != [None, None]):
            check_component(root, component, entry)
    return _read_flux(root, pipeline_class, index)


def check_unchanged(card: ModelCard) -> None:
    """That a worker loads what the server read, however much later it starts.

    Raises:
        CheckpointError: a file was written, removed or replaced meanwhile.
    """
    if _stamp(card.path) != card.stamp:
        raise CheckpointError(f"{card.path} was changed after the server started; restart the server")


def _read_flux(path: Path, pipeline_class: str, index: Mapping[str, Any]) -> ModelCard:
    transformer, vae, text_encoder, text_encoder_2 = (
        read_json(path / part / "config.json") for part in ("transformer", "vae", "text_encoder", "text_encoder_2")
    )
    has_guidance = bool(transformer.get("guidance_embeds", False))
    num_vae_blocks = len(get(vae, "block_out_channels", list, path / "vae/config.json"))
    if not 1 <= num_vae_blocks <= _MAX_VAE_BLOCKS:
        raise CheckpointError(
            f"{path / 'vae/config.json'}: block_out_channels has {num_vae_blocks} items; "
            f"allowed: 1 to {_MAX_VAE_BLOCKS}"
        )
    num_heads = get_count(transformer, "num_attention_heads", int, path / "transformer/config.json")
    _check_scheduler(path / "scheduler/scheduler_config.json")
    _check_vae(path / "vae/config.json", vae)
    _check_channels(path / "transformer/config.json", transformer, vae)
    _check_text_width(path / "transformer/config.json", transformer, text_encoder, text_encoder_2)
    _check_text_length(path / "tokenizer/tokenizer_config.json", text_encoder)
    _check_layers(path, index)
    vae_scale = 2 ** (num_vae_blocks - 1)
    overrides = _read_overrides(path / "tetriserve.json", 2 * vae_scale)
    sides = dict.fromkeys((_DEFAULT_SAMPLE_SIZE * vae_scale, *_SIDES))
    sizes = tuple(Shape(side, side) for side in sides if side % (2 * vae_scale) == 0)
    return ModelCard(
        name=overrides.get("name", hub_name(path)),
        path=path,
        pipeline_class=pipeline_class,
        dtype=overrides.get("dtype", "bfloat16"),
        size_multiple=2 * vae_scale,
        pixels_per_token=2 * vae_scale,
        num_heads=num_heads,
        num_text_tokens=overrides.get("max_sequence_length", MAX_TEXT_TOKENS),
        default_num_steps=overrides.get("num_steps", 28 if has_guidance else 4),
        default_guidance_scale=float(overrides.get("guidance_scale", 3.5)),
        has_guidance=has_guidance,
        has_negative_prompt=True,
        sizes=overrides.get("sizes", sizes),
        fingerprint=_fingerprint(transformer, vae, text_encoder, text_encoder_2),
        stamp=_stamp(path),
    )


def _check_scheduler(file: Path) -> None:
    scheduler = read_json(file)
    scheduler_class = get(scheduler, "_class_name", str, file)
    if scheduler_class != "FlowMatchEulerDiscreteScheduler" or scheduler.get("stochastic_sampling"):
        raise CheckpointError(
            f"{file}: scheduler {scheduler_class} keeps state or draws noise "
            "between steps; use FlowMatchEulerDiscreteScheduler without stochastic_sampling"
        )


def _check_vae(file: Path, vae: Mapping[str, Any]) -> None:
    for key in ("scaling_factor", "shift_factor"):
        if not abs(get(vae, key, (int, float), file)) <= 1e6:
            raise CheckpointError(f"{file}: {key} is {shown(vae[key])}; it must be from -1e+06 to 1e+06")


def _check_channels(file: Path, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """That the transformer takes latents and nothing else: FLUX Fill, Canny and Depth take a picture beside them."""
    expected = 4 * get_count(
        {"latent_channels": 4, **vae}, "latent_channels", int, file.parent.parent / "vae/config.json"
    )
    in_channels = transformer.get("in_channels", 64)
    for key, value in (("in_channels", in_channels), ("out_channels", transformer.get("out_channels"))):
        if value != expected and (key == "in_channels" or value is not None):
            raise CheckpointError(
                f"{file}: {key} is {quoted(value)}, but FluxPipeline needs {expected} (4 times latent_channels of the "
                "vae); FLUX Fill, Canny and Depth need pipelines that are not served"
            )


def _check_text_width(
    file: Path, transformer: Mapping[str, Any], text_encoder: Mapping[str, Any], text_encoder_2: Mapping[str, Any]
) -> None:
    for key, default, width, part in (
        ("pooled_projection_dim", 768, text_encoder.get("hidden_size", 512), "text_encoder"),
        ("joint_attention_dim", 4096, text_encoder_2.get("d_model", 512), "text_encoder_2"),
    ):
        if (expected := transformer.get(key, default)) != width:
            raise CheckpointError(
                f"{file}: {key} is {quoted(expected)}, but {part} makes embeddings of {quoted(width)}; they are of "
                "different checkpoints"
            )


def _check_text_length(file: Path, text_encoder: Mapping[str, Any]) -> None:
    """That CLIP's texts are cut where its positions end: the pipeline asks the tokenizer, whose default is no limit."""
    encoder_file = file.parent.parent / "text_encoder/config.json"
    positions = get_count({"max_position_embeddings": 77, **text_encoder}, "max_position_embeddings", int, encoder_file)
    length = read_json(file).get("model_max_length")
    if isinstance(length, bool) or not isinstance(length, int) or not 2 < length <= positions:
        raise CheckpointError(
            f"{file}: model_max_length is {quoted(length)}; set it to {quoted(positions)}, max_position_embeddings of "
            "the text_encoder"
        )


def _check_layers(path: Path, index: Mapping[str, Any]) -> None:
    """That each layer has tensors, and each tensor of a layer its place. Loading compares all tensors."""
    for component, key, default, prefix in _LAYERS:
        file = path / component / "config.json"
        num_layers = get({key: default} | read_json(file), key, int, file)
        pattern = re.compile(rf"(?:text_model\.)?{re.escape(prefix)}\.(\d{{1,6}})\.")
        names = sorted(find_weights(path / component, index[component][0]).tensor_names())
        found = {int(match[1]) for name in names if (match := pattern.match(name))}
        missing = next((layer for layer in range(num_layers) if layer not in found), None)
        if missing is None and len(found) <= num_layers:
            continue
        problem = f"have {prefix}.{max(found)}" if missing is None else f"lack {prefix}.{missing}"
        first = f"; the first tensor there is {names[0][:100]!r}" if names and not found else ""
        raise CheckpointError(
            f"{file}: {key} is {num_layers}, but the weights {problem}{first}; download the checkpoint again"
        )


def _read_overrides(file: Path, size_multiple: int) -> dict[str, Any]:
    """The checked contents of `tetriserve.json`, `sizes` as shapes; empty if there is no such file."""
    if not file.exists():
        return {}
    overrides = read_json(file)
    for key in overrides:
        if key not in _OVERRIDES:
            raise CheckpointError(f"{file}: unknown key {key!r}; allowed: {', '.join(_OVERRIDES)}")
        get(overrides, key, _OVERRIDES[key], file)
    if not is_model_name(name := overrides.get("name", "unnamed")):
        raise CheckpointError(
            f"{file}: name is {name[:200]!r}; allowed: {MODEL_NAMES}; without it, the directory's name"
        )
    if not 1 <= (num_steps := overrides.get("num_steps", 1)) <= MAX_STEPS:
        raise CheckpointError(f"{file}: num_steps is {shown(num_steps)}; allowed: 1 to {MAX_STEPS}")
    if not 1 <= (length := overrides.get("max_sequence_length", 1)) <= MAX_TEXT_TOKENS:
        raise CheckpointError(f"{file}: max_sequence_length is {shown(length)}; allowed: 1 to {MAX_TEXT_TOKENS}")
    if not 0 <= (guidance_scale := overrides.get("guidance_scale", 0)) <= 100:
        raise CheckpointError(f"{file}: guidance_scale is {shown(guidance_scale)}; allowed: 0 to 100")
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


def _fingerprint(*configs: Mapping[str, Any]) -> str:
    """Twelve hex digits over the configs, less what says nothing of the architecture (versions, paths, dtypes)."""
    ignored = ("transformers_version", "torch_dtype", "dtype")
    facts = [
        {key: value for key, value in config.items() if not key.startswith("_") and key not in ignored}
        for config in configs
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]


def _stamp(path: Path) -> str:
    """A digest over the names, sizes and times of the checkpoint's files."""
    facts = []
    for file in sorted((*path.glob("*.json"), *path.glob("*/*"))):
        with contextlib.suppress(OSError):  # a broken link: what needs it says so
            status = file.stat()
            facts.append((file.relative_to(path).as_posix(), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
