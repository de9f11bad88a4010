"""Loads LoRA adapters into a pipeline, by diffusers' own loaders, and has one of them active at a time.

Each layer that an adapter changes is wrapped, not fused: with no adapter active it computes what it did before, to the
bit, and with one what the pipeline does that has loaded it alone.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tetriserve.core.errors import CheckpointError
from tetriserve.core.request import Lora
from tetriserve.models.card import LoraFile
from tetriserve.models.lora import digest_of

_HARMLESS = "No LoRA keys associated to"
"""How diffusers says that an adapter leaves one of the models as it is."""
_LIBRARY = "diffusers"


class Adapters:
    """The adapters of a pipeline. After loading none is active.

    Of each, the parts are loaded that are for models which the pipeline has: a rank may have no text encoders.
    """

    def __init__(self, pipeline: Any, loras: Sequence[LoraFile]) -> None:
        """
        Raises:
            CheckpointError: one cannot be loaded, or not all that is for these models; one line names its file.
        """
        self._pipeline = pipeline
        self._names = {lora.name: f"adapter{number}" for number, lora in enumerate(loras)}  # peft allows no dots
        self._active: Lora | None = None
        self._loaded = {lora.name for lora in loras if _load(pipeline, lora, self._names[lora.name])}
        if self._loaded:
            pipeline.disable_lora()

    def activate(self, lora: Lora | None) -> None:
        """Have the model run with this adapter, or with none, from the next forward on.

        Raises:
            ValueError: it was not loaded.
        """
        if lora is not None and lora.name not in self._names:
            raise ValueError(f"lora {lora.name!r} is not loaded; loaded: {', '.join(self._names) or 'none'}")
        if lora is not None and lora.name not in self._loaded:
            lora = None  # it changes no model of this pipeline
        if lora == self._active:
            return
        if lora is None:
            self._pipeline.disable_lora()
        else:
            if self._active is None:
                self._pipeline.enable_lora()
            self._pipeline.set_adapters(self._names[lora.name], lora.scale)
        self._active = lora


def _load(pipeline: Any, lora: LoraFile, name: str) -> bool:
    """Whether the adapter is for any model that the pipeline has."""
    file = lora.file
    if digest_of(file) != lora.digest:
        raise CheckpointError(f"{file} was changed after the server started; restart the server")
    source = {"weight_name": file.name, "use_safetensors": True, "local_files_only": True}
    before = _base_shapes(pipeline)
    try:
        with _refusing_warnings(), _reading_what_is_for(pipeline) as absent:
            expected = pipeline.lora_state_dict(str(file.parent), **source)
            if absent and not expected:
                return False
            pipeline.load_lora_weights(str(file.parent), adapter_name=name, **source)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the libraries raise of every kind; a panic of safetensors is no Exception
        reason = " ".join(next(iter(str(error).strip().splitlines()), "").split())[:300] or type(error).__name__
        raise CheckpointError(f"{file} cannot be loaded into {type(pipeline).__name__}: {reason}") from error
    if _base_shapes(pipeline) != before:
        raise CheckpointError(f"{file} changes the sizes of the model's own layers; it was made for another model")
    _check_all_loaded(pipeline, file, name, expected)
    return True


@contextmanager
def _reading_what_is_for(pipeline: Any) -> Iterator[tuple[str, ...]]:
    """Meanwhile files are read without their parts for models that the pipeline could have and has not: diffusers'
    loaders would take them as well, and fail. Gives the names of these models."""
    absent = tuple(name for name in pipeline._lora_loadable_modules if getattr(pipeline, name, None) is None)
    prefixes = tuple(f"{name}." for name in absent)
    read = pipeline.lora_state_dict

    def lora_state_dict(*args: Any, **options: Any) -> Any:
        """The tensors by name, or a tuple that begins with them."""
        found = read(*args, **options)
        tensors, *others = found if isinstance(found, tuple) else (found,)
        kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefixes)}
        return (kept, *others) if isinstance(found, tuple) else kept

    pipeline.lora_state_dict = lora_state_dict
    try:
        yield absent
    finally:
        del pipeline.lora_state_dict


def _check_all_loaded(pipeline: Any, file: object, name: str, expected: dict[str, torch.Tensor]) -> None:
    """That each tensor of the file is in a layer as it was, and each tensor of the adapter from the file."""
    loaded = [
        parameter
        for model in _models(pipeline)
        for key, parameter in model.named_parameters()
        if f".{name}." in key and "lora_" in key
    ]
    dtypes = {parameter.dtype for parameter in loaded}
    digests = Counter(map(_digest, loaded))
    for key, tensor in sorted(expected.items()):
        if not any(digests[_digest(tensor.to(dtype))] for dtype in dtypes):
            raise CheckpointError(f"{file}: {key[:100]!r} has no place in the model; it was made for another model")
    if len(loaded) != len(expected):
        raise CheckpointError(
            f"{file} has {len(expected)} tensors where its layers have {len(loaded)}; it is not whole"
        )


def _digest(tensor: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return tuple(tensor.shape), hashlib.blake2b(data, digest_size=16).digest()  # type: ignore[arg-type]


def _models(pipeline: Any) -> list[torch.nn.Module]:
    models = [getattr(pipeline, component, None) for component in pipeline._lora_loadable_modules]
    return [model for model in models if model is not None]


def _base_shapes(pipeline: Any) -> list[dict[str, torch.Size]]:
    """Of the models' own parameters."""
    return [
        {
            key.replace(".base_layer.", "."): parameter.shape
            for key, parameter in model.named_parameters()
            if "lora_" not in key
        }
        for model in _models(pipeline)
    ]


@contextmanager
def _refusing_warnings() -> Iterator[None]:
    """Diffusers only warns of what it leaves out.

    Raises:
        ValueError: it did.
    """
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, listener = logging.getLogger(_LIBRARY), Listener(logging.WARNING)
    level, propagates = logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft finds several adapters remarkable
            yield
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = propagates
    for message in messages:
        if not message.startswith(_HARMLESS):
            raise ValueError(message)
