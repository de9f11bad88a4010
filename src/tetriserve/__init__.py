"""TetriServe: deadline-aware serving for diffusion transformers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tetriserve.api import Engine, Lora, ModelConfig, Picture

__all__ = ["Engine", "Lora", "ModelConfig", "Picture"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`Engine` is loaded when asked for, so that the command line answers at once."""
    if name in __all__:
        from tetriserve import api

        return getattr(api, name)
    raise AttributeError(f"module 'tetriserve' has no attribute {name!r}")
