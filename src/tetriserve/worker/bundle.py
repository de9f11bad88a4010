"""Named tensors as one piece of bytes (safetensors), read without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_NUMPY_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}


def arrays_of(data: bytes) -> dict[str, np.ndarray]:
    """For the server. bfloat16, which numpy does not have, comes as float32.

    Raises:
        safetensors.SafetensorError: it is not a bundle.
        MemoryError: it is too large for this process.
    """
    from safetensors import deserialize

    with no_panics():
        return {name: _array(view) for name, view in deserialize(data)}  # type: ignore[no-untyped-call]


@contextmanager
def no_panics() -> Iterator[None]:
    """safetensors panics where memory runs out, and a panic is no Exception: it would pass by every handler."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise MemoryError(f"{type(error).__name__}: {error}") from error


def _array(view: Mapping[str, Any]) -> np.ndarray:
    """One tensor as safetensors describes it: dtype, shape and bytes."""
    import numpy as np

    kind, data = view["dtype"], view["data"]
    if kind == "BF16":  # the upper half of a float32
        array = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        array = np.frombuffer(data, _NUMPY_DTYPES[kind])
    return array.reshape(view["shape"])
