"""How a model is run: what changes its times, and may change its pictures, while its weights stay the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tetriserve.core.bounds import shown
from tetriserve.core.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT = "default"
"""As diffusers does it."""
REGIONAL, FP8, VAE, TEXT_ENCODERS = "regional", "fp8", "vae", "text_encoders"
ATTENTIONS = (
    DEFAULT, "native", "native_flash", "native_cudnn", "native_efficient", "native_math", "flash", "flash_hub",
    "flash_3", "flash_3_hub", "flash_4_hub", "sage", "sage_hub", "xformers",
)  # fmt: skip
"""As diffusers names its backends, without the underscore before some. Those that end in `hub` are downloaded."""
_ALLOWED = {
    "dtype": DTYPES,
    "attention": ATTENTIONS,
    "compile": (DEFAULT, REGIONAL),
    "quantization": (DEFAULT, FP8),
    "tiling": (DEFAULT, VAE),
    "offload": (DEFAULT, TEXT_ENCODERS),
}


@dataclass(frozen=True, slots=True)
class Execution:
    """Part of a profile's identity: times of one execution say nothing of another.

    dtype: of weights and activations.
    attention: kernel of attention.
    compile: how the transformer is compiled; `regional`: its repeated blocks, one graph for each shape.
    quantization: of its linear layers; `fp8`: weights and activations, scaled by row.
    tiling: what decodes large pictures in tiles.
    offload: what is kept in the CPU's memory, and moved to the device for each use.

    Raises:
        ConfigError: a value that is not implemented, or not together with another; the message lists those that are.
    """

    dtype: str
    attention: str = DEFAULT
    compile: str = DEFAULT
    quantization: str = DEFAULT
    tiling: str = DEFAULT
    offload: str = DEFAULT

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value not in _ALLOWED[name]:
                raise ConfigError(f"{name} is {shown(value)}; allowed: {', '.join(_ALLOWED[name])}")
        if self.quantization == FP8 and self.dtype != "bfloat16":
            raise ConfigError(f"quantization is 'fp8' with dtype {self.dtype!r}; allowed with it: bfloat16")

    def __str__(self) -> str:
        """The dtype, and what else is not the default: `bfloat16,compile=...`."""
        others = [f"{name}={value}" for name, value in asdict(self).items() if name != "dtype" and value != DEFAULT]
        return ",".join([self.dtype, *others])

    def check_device(self, device: str) -> None:
        """That it means something on a kind of device, `cpu` or `cuda`.

        Raises:
            ConfigError: it needs a GPU.
        """
        if device != "cpu":
            return
        if self.quantization == FP8:
            raise ConfigError(f"quantization is 'fp8', which takes a GPU, but device is cpu; allowed there: {DEFAULT}")
        if self.offload == TEXT_ENCODERS:
            raise ConfigError(
                "offload-text-encoders is set, but device is cpu, where there is nothing to offload; leave it out"
            )
