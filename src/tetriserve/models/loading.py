"""Loading a diffusers pipeline such that what is loaded is what its directory says, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib import import_module
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers

from tetriserve.core.errors import CheckpointError
from tetriserve.models.adapters import Adapters
from tetriserve.models.execution import apply, check_machine, loading_options, place
from tetriserve.models.files import find_weights, module_of, read_json

if TYPE_CHECKING:
    from pathlib import Path

    from tetriserve.models.card import ModelCard

_PROBLEMS = (
    ("missing_keys", "lack"),
    ("unexpected_keys", "have"),
    ("mismatched_keys", "have in another shape"),
)
"""What both libraries tell of a load, in the order of the line's worth, and how to say it."""


_TEXT_COMPONENTS = ("text_encoder", "tokenizer")
"""How the names of components begin that only read prompts."""


def load_pipeline(
    card: ModelCard,
    dtype: torch.dtype,
    device: torch.device,
    components: Callable[[], dict[str, Any]] = dict,
    *,
    has_text_encoders: bool = True,
    in_float32: Collection[str] = (),
) -> tuple[Any, Adapters]:
    """The pipeline on `device`, such that it runs as the card's execution says, and its adapters.

    Without text encoders neither they nor their tokenizers are read, and the pipeline has None in their place.

    components: loads parts of it, by name, that are not to be loaded as the library would.
    in_float32: components that do not take the other models' dtype.

    Raises:
        CheckpointError: the model cannot be loaded; one line says why.
        ConfigError: this machine cannot run it so; one line names the value, and what is allowed.
    """
    check_machine(card.execution, device)
    pipeline, adapters = _load(card, dtype, device, components, has_text_encoders, in_float32)
    apply(card.execution, pipeline, dtype, device)
    return pipeline, adapters


def weights_of(pipeline: Any) -> list[torch.Tensor]:
    """Of all models. Text encoders come last: ranks without them have the others at the same places."""
    models = [(name, model) for name, model in pipeline.components.items() if isinstance(model, torch.nn.Module)]
    models.sort(key=lambda each: each[0].startswith("text_encoder"))
    return [weight for _, model in models for weight in model.parameters()]


def held_bytes(pipeline: Any) -> dict[str, int]:
    """Bytes of parameters and buffers by component, on whichever device they are; what two share counts once."""
    counted: set[int] = set()
    held: dict[str, int] = {}
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            tensors = [each for each in (*component.parameters(), *component.buffers()) if id(each) not in counted]
            counted.update(map(id, tensors))
            held[name] = sum(map(_num_bytes, tensors))
    return held


def _num_bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # quantised: its own dtype is that of what it stands for
        return sum(_num_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _load(
    card: ModelCard,
    dtype: torch.dtype,
    device: torch.device,
    components: Callable[[], dict[str, Any]],
    has_text_encoders: bool,
    in_float32: Collection[str],
) -> tuple[Any, Adapters]:
    """Each model is loaded alone: only then the libraries tell what they filled in or left out."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    folder = card.path
    try:
        models: dict[str, Any] = {}
        texts: dict[str, Any] = {}
        for component, entry in read_json(card.path / "model_index.json").items():
            if entry == [None, None] or (component.startswith(_TEXT_COMPONENTS) and not has_text_encoders):
                models[component] = None  # a pipeline may insist on being told
            elif isinstance(entry, list):
                folder, (library, class_name) = card.path / component, entry
                extra = loading_options(card.execution, device) if component.startswith("transformer") else {}
                own = torch.float32 if component in in_float32 else dtype
                model = _load_model(folder, library, class_name, own, extra)
                if model is not None:
                    models[component] = model
                elif component.startswith("tokenizer") and class_name.endswith("Processor"):
                    # Its part for texts: nothing else is used, and the part for pictures would need torchvision.
                    texts[component] = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
                    models[component] = None
        folder = card.path
        models |= components()
        pipeline_class = getattr(diffusers, card.pipeline_class)
        pipeline = pipeline_class.from_pretrained(str(card.path), local_files_only=True, dtype=dtype, **models)
        pipeline.register_modules(**texts)
        adapters = Adapters(pipeline, card.loras)  # first: what follows finds their layers in place
        place(card.execution, pipeline, device)
        return pipeline, adapters
    except (CheckpointError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the libraries raise of every kind; a panic of safetensors is no Exception
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise CheckpointError(f"{folder} cannot be loaded: {reason}") from error


def _load_model(folder: Path, library: str, class_name: str, dtype: torch.dtype, extra: dict[str, Any]) -> Any:
    """The model in `folder`, with `extra` options; None if it is a tokenizer or a scheduler."""
    module = module_of(library)
    assert module is not None, "the card was read before"
    model_class = getattr(import_module(module), class_name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, torch.nn.Module)):
        return None
    options: dict[str, Any] = {"torch_dtype": dtype}
    if library == "transformers":  # which would raise an error that names no tensor; diffusers' does
        options = {"dtype": dtype, "ignore_mismatched_sizes": True}
    model, report = model_class.from_pretrained(  # type: ignore[attr-defined]
        str(folder),
        variant=find_weights(folder, library).variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **options,
        **extra,
    )
    for problem, verb in _PROBLEMS:
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in report[problem])
        if names:
            others = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
            raise CheckpointError(
                f"{folder}: the weights {verb} {names[0]!r}{others}, against config.json; download the checkpoint again"
            )
    return model
