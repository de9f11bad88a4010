"""The model families that can be served: the only list of them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from tetriserve.core.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from tetriserve.models.adapter import Adapter
    from tetriserve.models.card import ModelCard

ADAPTERS = {
    "FluxPipeline": "tetriserve.models.flux:FluxAdapter",
}
"""The diffusers pipeline class, as `model_index.json` names it, to `module:Class` of its adapter."""


def adapter_target(pipeline_class: str) -> str:
    """`module:Class` of the adapter that serves `pipeline_class`; nothing is imported.

    Raises:
        CheckpointError: no adapter serves it; the message lists the classes that are served.
    """
    try:
        return ADAPTERS[pipeline_class]
    except KeyError:
        supported = ", ".join(sorted(ADAPTERS))
        raise CheckpointError(f"no adapter serves pipeline class {pipeline_class!r}; supported: {supported}") from None


def load_adapter(card: ModelCard, device: torch.device | str, target: str | None = None) -> Adapter:
    """Load the checkpoint onto `device`. Imports torch and diffusers, so only a worker calls it.

    `target` (`module:Class`) overrides the adapter of the checkpoint's pipeline class.

    Raises:
        CheckpointError: the pipeline class is not served, or its files cannot be loaded.
    """
    module, _, name = (target or adapter_target(card.pipeline_class)).partition(":")
    return cast("Adapter", getattr(import_module(module), name)(card, device))
