"""A checkpoint's card, read from its directory: what all families share. Each family's part is in its `facts`."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from tetriserve.config import MODEL_NAMES, is_model_name
from tetriserve.core.bounds import MAX_STEPS, shown
from tetriserve.core.errors import CheckpointError, ConfigError
from tetriserve.core.request import Shape
from tetriserve.models.card import ModelCard
from tetriserve.models.files import check_component, find_root, get, quoted, read_json
from tetriserve.models.registry import find_family
from tetriserve.models.tiles import read_tiles

_OVERRIDES: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "num_steps": int,
    "guidance_scale": (int, float),
    "sizes": list,
    "dtype": str,
    "max_sequence_length": int,
}
_FIELDS = {
    "name": "name",
    "num_steps": "default_num_steps",
    "guidance_scale": "default_guidance_scale",
    "sizes": "sizes",
    "dtype": "execution",
    "max_sequence_length": "num_text_tokens",
}
"""Of the card, by key of `tetriserve.json`."""


def read_card(path: Path, adapter: str | None = None) -> ModelCard:
    """Read the facts of the diffusers checkpoint in directory `path`, and check that all its files are there.

    `path` may be a hub folder `models--...` with one snapshot. A `tetriserve.json` beside `model_index.json` overrides
    any of {"name": str, "num_steps": int, "guidance_scale": number, "sizes": ["WIDTHxHEIGHT", ...], "dtype":
    "float32" | "bfloat16" | "float16", "max_sequence_length": int}; the first of the sizes is the default. A size of a
    video is "WIDTHxHEIGHTxFRAMES".
    Only JSON files and the headers of weights files are read.

    adapter: the name of the family to serve it; None is the one that serves its pipeline class.

    Raises:
        ConfigError: no family has that name.
        CheckpointError: one line that names the file at fault and how to mend it.
    """
    root = find_root(path)
    index = read_json(root / "model_index.json")
    pipeline_class = get(index, "_class_name", str, root / "model_index.json")
    try:
        family = find_family(pipeline_class, adapter)
    except CheckpointError as error:
        raise CheckpointError(f"{root}: {error}") from None
    for component in family.components:
        if index.get(component) in (None, [None, None]):
            raise CheckpointError(
                f"{root / 'model_index.json'}: {component} is {quoted(index.get(component))}; {pipeline_class} needs "
                "it: download the whole checkpoint"
            )
    for component, entry in index.items():
        if component in family.components or (isinstance(entry, list) and entry != [None, None]):
            check_component(root, component, entry)
    card = family.read(root, pipeline_class, index)
    overrides = _read_overrides(root / "tetriserve.json", card, family.max_text_tokens)
    # A pipeline's own call, which any class is driven by, decodes on one rank.
    tiles = None if family.takes_any_class else read_tiles(root)
    return replace(card, stamp=_stamp(root), tiles=tiles, **overrides)


def check_unchanged(card: ModelCard) -> None:
    """That a worker loads what the server read, however much later it starts.

    Raises:
        CheckpointError: a file was written, removed or replaced meanwhile.
    """
    if _stamp(card.path) != card.stamp:
        raise CheckpointError(f"{card.path} was changed after the server started; restart the server")


def _read_overrides(file: Path, card: ModelCard, max_text_tokens: int) -> dict[str, Any]:
    """What `tetriserve.json` changes of `card`, checked, by field; empty if there is no such file."""
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
    if not (least := card.min_num_steps) <= (num_steps := overrides.get("num_steps", least)) <= MAX_STEPS:
        raise CheckpointError(f"{file}: num_steps is {shown(num_steps)}; allowed: {least} to {MAX_STEPS}")
    if not 1 <= (length := overrides.get("max_sequence_length", 1)) <= max_text_tokens:
        raise CheckpointError(f"{file}: max_sequence_length is {shown(length)}; allowed: 1 to {max_text_tokens}")
    if card.num_text_tokens == 0 and "max_sequence_length" in overrides:
        raise CheckpointError(f"{file}: {card.pipeline_class} takes no max_sequence_length; remove it")
    if not 0 <= (guidance_scale := overrides.get("guidance_scale", 0)) <= 100:
        raise CheckpointError(f"{file}: guidance_scale is {shown(guidance_scale)}; allowed: 0 to 100")
    if "guidance_scale" in overrides:
        overrides["guidance_scale"] = float(guidance_scale)
    if "dtype" in overrides:
        try:
            overrides["dtype"] = replace(card.execution, dtype=overrides["dtype"])
        except ConfigError as error:
            raise CheckpointError(f"{file}: {error}") from None
    if "sizes" in overrides:
        try:
            sizes = tuple(_size(str(size), card) for size in overrides["sizes"])
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}") from None
        bad = [str(size) for size in sizes if not _is_possible(size, card)]
        if bad or not sizes:
            frames = f", and 1 + a multiple of {card.frame_step} frames, at most {card.max_frames}"
            raise CheckpointError(
                f"{file}: sizes {bad} are not possible; list at least one, each side a multiple of "
                f"{card.size_multiple}{frames if card.makes_videos else ''}"
            )
        overrides["sizes"] = sizes
    return {_FIELDS[key]: value for key, value in overrides.items()}


def _size(text: str, card: ModelCard) -> Shape:
    """Of `WIDTHxHEIGHT`, or of a video `WIDTHxHEIGHTxFRAMES`; without frames it has those of the default.

    Raises:
        ValueError: the text is neither.
    """
    size, times, frames = text, "", ""
    if card.makes_videos and text.count("x") == 2:
        size, times, frames = text.rpartition("x")
        if not (frames.isascii() and frames.isdigit() and len(frames) <= 6):
            raise ValueError(f"size {text[:40]!r} is not of the form WIDTHxHEIGHTxFRAMES, such as 832x480x81")
    return replace(Shape.parse(size), frames=int(frames) if times else card.sizes[0].frames)


def _is_possible(size: Shape, card: ModelCard) -> bool:
    if size.height % card.size_multiple or size.width % card.size_multiple:
        return False
    return size.frames <= card.max_frames and (size.frames - 1) % max(card.frame_step, 1) == 0 < size.frames


def _stamp(path: Path) -> str:
    """A digest over the names, sizes and times of the checkpoint's files."""
    facts = []
    for file in sorted((*path.glob("*.json"), *path.glob("*/*"))):
        with contextlib.suppress(OSError):  # a broken link: what needs it says so
            status = file.stat()
            facts.append((file.relative_to(path).as_posix(), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
