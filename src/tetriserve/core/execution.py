"""How a model is run: what changes its times, and may change its pictures, while its weights stay the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tetriserve.core.bounds import shown
from tetriserve.core.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
_DEFAULT = "default"
"""As diffusers does it."""
_ALLOWED = {
    "dtype": DTYPES,
    "attention": (_DEFAULT,),
    "compile": (_DEFAULT,),
    "quantization": (_DEFAULT,),
    "tiling": (_DEFAULT,),
}


@dataclass(frozen=True, slots=True)
class Execution:
    """Part of a profile's identity: times of one execution say nothing of another.

    dtype: of weights and activations.
    attention: kernel of attention.
    compile: how the transformer is compiled.
    quantization: of its weights.
    tiling: how the VAE cuts a picture into tiles.

    Raises:
        ConfigError: a value that is not implemented; the message lists those that are.
    """

    dtype: str
    attention: str = _DEFAULT
    compile: str = _DEFAULT
    quantization: str = _DEFAULT
    tiling: str = _DEFAULT

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value not in _ALLOWED[name]:
                raise ConfigError(f"{name} is {shown(value)}; allowed: {', '.join(_ALLOWED[name])}")

    def __str__(self) -> str:
        """The dtype, and what else is not the default: `bfloat16,compile=...`."""
        others = [f"{name}={value}" for name, value in asdict(self).items() if name != "dtype" and value != _DEFAULT]
        return ",".join([self.dtype, *others])
